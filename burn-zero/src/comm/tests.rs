use super::*;
use crate::CommError;
use half::{bf16, f16};
use std::{fmt::Debug, time::Duration};

mod exchange;

const WORLDS: std::ops::RangeInclusive<usize> = 1..=4;

/// Returns value `i` of rank `rank`; the magnitudes differ so much that an f32 sum depends on its order.
fn value(rank: usize, i: usize) -> f32 {
    let x = ((rank * 7919 + i * 104_729) % 1009) as f32 / 1009.0 - 0.5;
    x * 10f32.powi((rank as i32 * 3 + i as i32) % 7)
}

fn values<T: Element>(rank: usize, n: usize) -> Vec<T> {
    (0..n).map(|i| T::from_f32(value(rank, i))).collect()
}

/// Returns the sums in rank order, in f32, rounded once.
fn sums<T: Element>(world: usize, n: usize) -> Vec<T> {
    let sum = |i| (1..world).fold(T::from_f32(value(0, i)).to_f32(), |sum, r| sum + T::from_f32(value(r, i)).to_f32());
    (0..n).map(|i| T::from_f32(sum(i))).collect()
}

/// Runs a test on the ranks of thread worlds of all sizes, and on [`Solo`].
fn in_every_world(law: impl Fn(&mut dyn Communicator) + Sync) {
    law(&mut Solo);
    for world in WORLDS {
        threads::run(world, |mut group| law(&mut group));
    }
}

fn every_collective_keeps_its_promise<T: Element + PartialEq + Debug>() {
    in_every_world(|group| {
        let (rank, world) = (group.rank(), group.world_size());
        for n in [0, 1, 5, 300] {
            let mut all = values::<T>(rank, n);
            group.all_reduce(&mut all).unwrap();
            assert_eq!(all, sums::<T>(world, n), "all_reduce of {n}, rank {rank} of {world}");

            let (whole, mut shard) = (values::<T>(rank, n * world), values::<T>(9, n));
            group.reduce_scatter(&whole, &mut shard).unwrap();
            assert_eq!(shard, sums::<T>(world, n * world)[rank * n..][..n], "reduce_scatter of {n}, {rank} of {world}");

            let mut gathered = vec![T::ZERO; n * world];
            group.all_gather(&values::<T>(rank, n), &mut gathered).unwrap();
            let expected: Vec<T> = (0..world).flat_map(|rank| values(rank, n)).collect();
            assert_eq!(gathered, expected, "all_gather of {n}, rank {rank} of {world}");

            for root in 0..world {
                let mut copy = values::<T>(rank, n);
                group.broadcast(&mut copy, root).unwrap();
                assert_eq!(copy, values::<T>(root, n), "broadcast of {n} from {root} to {rank} of {world}");
            }
            for (from, to) in (0..world).flat_map(|from| (0..world).map(move |to| (from, to))) {
                if from != to && rank == from {
                    group.send(&values::<T>(from, n), to).unwrap();
                } else if from != to && rank == to {
                    let mut copy = vec![T::ZERO; n];
                    group.recv(&mut copy, from).unwrap();
                    assert_eq!(copy, values::<T>(from, n), "sent from {from} to {to} of {world}");
                }
            }
            group.barrier().unwrap();
        }
        let notes = group.all_gather_object(&vec![rank as u8; rank]).unwrap();
        assert_eq!(notes, (0..world).map(|rank| vec![rank as u8; rank]).collect::<Vec<_>>());
    });
}

/// Uses buffers that take several messages and divide into unequal parts.
#[test]
fn what_is_larger_than_a_message_is_the_same() {
    in_every_world(|group| {
        let (rank, world, n) = (group.rank(), group.world_size(), 600_001);
        let mut all = values::<f32>(rank, n);
        group.all_reduce(&mut all).unwrap();
        assert!(all == sums::<f32>(world, n), "all_reduce, rank {rank} of {world}");
        let (whole, mut shard) = (values::<f32>(rank, n * world), vec![0.0; n]);
        group.reduce_scatter(&whole, &mut shard).unwrap();
        assert!(shard == sums::<f32>(world, n * world)[rank * n..][..n], "reduce_scatter, rank {rank} of {world}");
        let mut gathered = vec![0.0; n * world];
        group.all_gather(&shard, &mut gathered).unwrap();
        assert!(gathered == sums::<f32>(world, n * world), "all_gather, rank {rank} of {world}");
    });
}

#[test]
fn every_collective_keeps_its_promise_in_f32() {
    every_collective_keeps_its_promise::<f32>();
}

#[test]
fn every_collective_keeps_its_promise_in_f16() {
    every_collective_keeps_its_promise::<f16>();
}

#[test]
fn every_collective_keeps_its_promise_in_bf16() {
    every_collective_keeps_its_promise::<bf16>();
}

#[test]
fn a_sum_goes_on_from_what_the_shard_holds() {
    in_every_world(|group| {
        let (rank, world, n) = (group.rank(), group.world_size(), 40);
        let mut shard: Vec<f32> = values(rank + 50, n);
        let mut expected = shard.clone();
        group.reduce_scatter_accumulate(&values::<f32>(rank, n * world), &mut shard).unwrap();
        for r in 0..world {
            expected.iter_mut().enumerate().for_each(|(i, sum)| *sum += value(r, rank * n + i));
        }
        assert_eq!(shard, expected);
    });
}

#[test]
fn elements_and_bytes_are_counted_as_the_papers_count() {
    for world in WORLDS {
        for traffic in threads::run(world, |mut group| {
            let n = 12 * world;
            group.all_reduce(&mut vec![bf16::ONE; n]).unwrap();
            let after_all_reduce = group.traffic();
            group.reduce_scatter(&vec![1f32; n], &mut [0.0; 12]).unwrap();
            group.all_gather(&[f16::ONE; 12], &mut vec![f16::ZERO; n]).unwrap();
            group.all_gather_object(&[0; 8]).unwrap();
            (after_all_reduce.reduced, group.traffic())
        }) {
            let (all_reduce, traffic) = traffic;
            // n (world_size − 1) / world_size
            let once = 12 * (world as u64 - 1);
            assert_eq!(all_reduce, CommVolume { elements: 2 * once, bytes: 4 * once });
            assert_eq!(traffic.reduced, CommVolume { elements: 3 * once, bytes: 8 * once });
            assert_eq!(traffic.gathered, CommVolume { elements: once, bytes: 2 * once });
            assert_eq!(traffic.control.bytes, 8 * (world as u64 - 1));
        }
    }
}

#[test]
fn groups_of_a_group_keep_apart() {
    threads::run(4, |mut group| {
        let rank = group.rank();
        // Rows (0 1) (2 3) and columns (0 2) (1 3), the columns in reverse order.
        let mut row = group.split(rank / 2, rank).unwrap();
        let mut column = group.split(rank % 2, 4 - rank).unwrap();
        assert_eq!((row.rank(), row.world_size()), (rank % 2, 2));
        assert_eq!((column.rank(), column.world_size()), (1 - rank / 2, 2));
        for _ in 0..3 {
            let (mut a, mut b) = ([rank as f32], [rank as f32]);
            row.all_reduce(&mut a).unwrap();
            column.all_reduce(&mut b).unwrap();
            assert_eq!(a, [(rank / 2 * 4 + 1) as f32]);
            assert_eq!(b, [(rank % 2 * 2 + 2) as f32]);
        }
        let alone = row.split(rank, 0).unwrap();
        assert_eq!((alone.rank(), alone.world_size()), (0, 1));
        let mut all = [1f32];
        group.all_reduce(&mut all).unwrap();
        assert_eq!(all, [4.0]);
    });
}

#[test]
fn a_rank_that_ends_is_an_error_that_names_it() {
    for (rank, result) in threads::run(3, |mut group| match group.rank() {
        1 => Ok(()),
        _ => group.all_reduce(&mut [1f32; 4]),
    })
    .into_iter()
    .enumerate()
    {
        match result {
            Ok(()) => assert_eq!(rank, 1),
            Err(error) => {
                assert!(
                    matches!(
                        error,
                        Error::Communication(CommError::Lost { operation: "all_reduce", rank: 1, waited: None, .. })
                    ),
                    "{error}"
                )
            }
        }
    }
}

#[test]
fn a_silent_rank_is_an_error_after_the_deadline() {
    let wait = Duration::from_millis(200);
    let results = threads::run(2, |group| {
        let mut group = group.with_deadline(wait);
        if group.rank() == 1 {
            group.compute_lock().unlocked(|| std::thread::sleep(4 * wait));
            return Ok(());
        }
        group.barrier()
    });
    let error = results.into_iter().next().unwrap().unwrap_err();
    assert!(
        matches!(error, Error::Communication(CommError::Lost { operation: "barrier", rank: 1, waited: Some(_), .. })),
        "{error}"
    );
    assert!(error.to_string().contains("rank 1 has not answered for 0.2 s"), "{error}");
}

#[test]
fn ranks_out_of_step_find_out() {
    let errors = threads::run(2, |mut group| match group.rank() {
        0 => group.all_reduce(&mut [1f32; 2]).unwrap_err(),
        _ => group.reduce_scatter(&[1f32; 2], &mut [0f32]).unwrap_err(),
    });
    assert!(
        errors.iter().any(|error| matches!(error, Error::Communication(CommError::CollectiveMismatch { .. }))),
        "{errors:?}"
    );
    let errors = threads::run(2, |mut group| {
        let n = 4 + 2 * group.rank();
        group.reduce_scatter(&vec![1f32; n], &mut vec![0f32; n / 2]).unwrap_err()
    });
    for (error, (own, other)) in errors.iter().zip([(2, 3), (3, 2)]) {
        assert!(
            matches!(error, Error::Communication(CommError::LengthMismatch { expected, found, .. })
                if (*expected, *found) == (own, other)),
            "{error}"
        );
    }
}

#[test]
fn what_does_not_exist_is_refused() {
    let mut solo = Solo;
    assert!(matches!(solo.send(&[1f32], 0), Err(Error::Communication(CommError::UnknownRank { rank: 0, .. }))));
    assert!(matches!(solo.send(&[1f32], 1), Err(Error::Communication(CommError::UnknownRank { rank: 1, .. }))));
    assert!(matches!(
        solo.broadcast(&mut [1f32], 1),
        Err(Error::Communication(CommError::UnknownRank { rank: 1, world: 1, .. }))
    ));
    assert!(matches!(
        solo.all_gather(&[1f32; 3], &mut [0f32]),
        Err(Error::Communication(CommError::LengthMismatch { expected: 3, found: 1, .. }))
    ));
    assert!(solo.split(3, 1).is_ok_and(|alone| alone.world_size() == 1));
}

#[test]
fn a_queue_works_beside_the_computation_and_gives_up_after_an_error() {
    let wait = Duration::from_millis(100);
    let found = threads::run(3, |group| {
        let rank = group.rank();
        let queue = AsyncCommunicator::new(Box::new(group.with_deadline(wait * 20)));
        let submit = |n: usize| {
            queue.submit("all_reduce", move |group| {
                let mut buffer = vec![1f32; n];
                group.all_reduce(&mut buffer).map(|()| buffer)
            })
        };
        let pending: Vec<_> = (1..9).map(submit).collect();
        for (n, pending) in pending.into_iter().enumerate() {
            assert_eq!(pending.wait().unwrap(), vec![3f32; n + 1]);
        }
        if rank == 2 {
            return None;
        }
        let (first, second) = (submit(1), submit(1));
        Some((first.wait().unwrap_err(), second.wait().unwrap_err()))
    });
    // Ranks 0 and 1 may find that rank 2 has ended, or that the other one has after its own error.
    for errors in found.iter().flatten() {
        assert!(
            matches!(
                errors,
                (Error::Communication(CommError::Lost { waited: None, .. }), Error::Communication(CommError::Aborted))
            ),
            "{errors:?}"
        );
    }
    assert!(
        found.iter().flatten().any(|(error, _)| matches!(error, Error::Communication(CommError::Lost { rank: 2, .. })))
    );
}
