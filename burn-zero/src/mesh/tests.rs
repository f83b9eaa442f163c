//! The places of ranks, and meshes between threads.

use super::*;
use crate::comm::{Collectives, CommVolume, Pending, threads};
use std::time::Duration;

const SHAPES: [[usize; 3]; 6] = [[1, 1, 1], [2, 1, 1], [1, 2, 1], [2, 2, 1], [3, 2, 1], [1, 3, 1]];

fn shape([data, pipeline, tensor]: [usize; 3]) -> MeshShape {
    MeshShape { data, pipeline, tensor }
}

fn in_mesh<R: Send>(sizes: [usize; 3], law: impl Fn(Mesh, usize) -> R + Sync) -> Vec<R> {
    let shape = shape(sizes);
    threads::run(sizes.iter().product(), |group| {
        let rank = group.rank();
        law(Mesh::new(Box::new(group.with_deadline(Duration::from_secs(20))), shape).unwrap(), rank)
    })
}

/// Returns `value` of every rank of a group, in the order of the group.
fn gather(communicator: &AsyncCommunicator, value: usize) -> Pending<Vec<u8>> {
    communicator.submit("gather", move |group| {
        group.all_gather_object(&[value as u8]).map(|values| values.into_iter().flatten().collect())
    })
}

#[test]
fn ranks_are_numbered_along_tensor_then_data_then_pipeline() {
    for sizes in SHAPES.into_iter().chain([[2, 1, 2], [3, 4, 5]]) {
        let (shape, mut next) = (shape(sizes), 0);
        for pipeline in 0..sizes[1] {
            for data in 0..sizes[0] {
                for tensor in 0..sizes[2] {
                    let place = MeshCoordinates { data, pipeline, tensor };
                    assert_eq!(shape.coordinates(next), place, "{shape:?}");
                    next += 1;
                }
            }
        }
        assert_eq!(shape.ranks(), Some(next));
    }
}

#[test]
fn the_groups_of_an_axis_are_those_that_share_the_other_places() {
    for sizes in SHAPES {
        let (shape, world) = (shape(sizes), sizes.iter().product::<usize>());
        in_mesh(sizes, |mesh, rank| {
            let place = shape.coordinates(rank);
            let members = |same: &dyn Fn(MeshCoordinates) -> bool| -> Vec<u8> {
                (0..world).filter(|&rank| same(shape.coordinates(rank))).map(|rank| rank as u8).collect()
            };
            let data = members(&|other| other.pipeline == place.pipeline);
            let pipeline = members(&|other| other.data == place.data);
            for (communicator, members, index) in
                [(&mesh.data, data, place.data), (&mesh.pipeline, pipeline, place.pipeline)]
            {
                assert_eq!(gather(communicator, rank).wait().unwrap(), members, "{shape:?}, rank {rank}");
                assert_eq!((communicator.rank(), communicator.world_size()), (index, members.len()));
            }
        });
    }
}

/// The ranks of the first stage start a collective of the pipeline that the others join only after a collective of the
/// data axis, in which the first stage takes part as well.
#[test]
fn collectives_of_different_axes_do_not_wait_for_each_other() {
    in_mesh([2, 2, 1], |mesh, rank| {
        let early = (rank < 2).then(|| gather(&mesh.pipeline, rank));
        assert_eq!(gather(&mesh.data, rank).wait().unwrap().len(), 2);
        let late = early.unwrap_or_else(|| gather(&mesh.pipeline, rank));
        assert_eq!(late.wait().unwrap().len(), 2);
    });
}

/// Returns the bits of the sum over a group of values whose sum depends on the order; `number` makes them this rank's.
fn sum(group: &mut dyn Communicator, number: usize) -> Vec<u32> {
    let value = |i: usize| ((number * 7919 + i * 104_729) % 1009) as f32 * 10f32.powi((number + i) as i32 % 7);
    let mut values: Vec<f32> = (0..50).map(value).collect();
    group.all_reduce(&mut values).unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn the_sum_over_an_axis_is_bit_for_bit_that_over_a_group() {
    let expected = threads::run(3, |mut group| {
        let rank = group.rank();
        [0, 3].map(|first| sum(&mut group, first + rank))
    });
    let found = in_mesh([3, 2, 1], |mesh, rank| {
        mesh.data.submit("all_reduce", move |group| Ok(sum(group, rank))).wait().unwrap()
    });
    for (rank, found) in found.into_iter().enumerate() {
        assert_eq!(found, expected[rank % 3][rank / 3], "rank {rank}");
    }
    assert_ne!(expected[0][0], expected[0][1]);
}

#[test]
fn traffic_is_counted_by_axis() {
    for traffic in in_mesh([2, 3, 1], |mesh, _| {
        let reduce = |communicator: &AsyncCommunicator, n: usize| {
            let reduce = communicator.submit("all_reduce", move |group| group.all_reduce(&mut vec![1f32; n]));
            reduce.wait().unwrap();
        };
        reduce(&mesh.data, 8);
        reduce(&mesh.pipeline, 9);
        MeshTraffic { data: mesh.data.traffic(), pipeline: mesh.pipeline.traffic() }
    }) {
        // 2 n (ranks − 1) / ranks
        let volume = |elements| Traffic { reduced: CommVolume { elements, bytes: 4 * elements }, ..Default::default() };
        assert_eq!(traffic, MeshTraffic { data: volume(8), pipeline: volume(12) });
    }
}

#[test]
fn collectives_of_the_axes_have_lanes_of_their_own() {
    in_mesh([2, 2, 1], |mesh, _| {
        for communicator in [&mesh.data, &mesh.pipeline] {
            gather(communicator, 0).wait().unwrap();
        }
        let events = mesh.data.trace().events(0);
        let thread = |wanted: &str| {
            let named = events.iter().find(|event| event["name"] == "thread_name" && event["args"]["name"] == wanted);
            let tid = named.map(|event| event["tid"].clone()).unwrap();
            events.iter().filter(|event| event["name"] == "gather" && event["tid"] == tid).count()
        };
        for name in ["communication", "communication of the pipeline axis"] {
            assert_eq!(thread(name), 1, "{name}");
        }
    });
}

#[test]
fn a_wrong_shape_is_one_error_with_the_numbers() {
    for (sizes, world) in [([2, 2, 1], 3), ([0, 2, 1], 2), ([1, 1, 0], 0), ([usize::MAX, 2, 1], 4), ([1, 1, 1], 2)] {
        let error = shape(sizes).check(world).unwrap_err().to_string();
        let [data, pipeline, tensor] = sizes;
        let product = format!("data {data} x pipeline {pipeline} x tensor {tensor} is not the {world} ranks");
        assert!(error.starts_with(&product), "{error}");
    }
    let error = Mesh::new(Box::new(Solo), shape([1, 2, 1])).unwrap_err().to_string();
    assert!(error.starts_with("data 1 x pipeline 2 x tensor 1 is not the 1 ranks"), "{error}");
    let error = shape([1, 2, 2]).check_trainable().unwrap_err().to_string();
    assert!(error.starts_with("`tensor`: 2 is not supported"), "{error}");
    assert!(shape([2, 2, 1]).check_trainable().is_ok());
}
