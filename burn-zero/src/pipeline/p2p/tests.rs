//! Messages between the ranks of thread worlds.

use super::*;
use crate::comm::{Collectives, CommVolume, ProcessGroup, threads};
use burn::{
    backend::Flex,
    tensor::{DType, TensorData, ops::FloatTensorOps},
};
use std::time::Duration;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn tensor(values: &[f32], dims: &[usize], dtype: DType) -> DynTensor<Flex> {
    let data = TensorData::new(values.to_vec(), dims.to_vec()).convert_dtype(dtype);
    DynTensor::from_primitive(Flex::float_from_data(data, &Default::default()))
}

fn value(number: usize, dims: &[usize], dtype: DType) -> P2pValue<Flex> {
    let n: usize = dims.iter().product();
    let values: Vec<f32> = (0..n).map(|i| ((number * 7919 + i * 104_729) % 1009) as f32 / 7.0 - 60.0).collect();
    P2pValue { tensor: Some(tensor(&values, dims, dtype)), requires_grad: number.is_multiple_of(2) }
}

/// The content of a value: dtype, shape, bytes and the gradient mark.
type Content = (bool, Option<(DType, Vec<usize>, Vec<u8>)>);

fn content(values: Vec<P2pValue<Flex>>) -> Vec<Content> {
    let tensor =
        |tensor: DynTensor<Flex>| (tensor.dtype(), tensor.dims(), tensor.flatten().into_data().as_bytes().to_vec());
    values.into_iter().map(|value| (value.requires_grad, value.tensor.map(tensor))).collect()
}

fn messages() -> Vec<Vec<P2pValue<Flex>>> {
    let none = |requires_grad| P2pValue { tensor: None, requires_grad };
    let shapes: [&[usize]; 7] = [&[3, 4], &[5], &[0], &[2, 0, 3], &[1, 1, 1, 1], &[7, 1, 3], &[]];
    let each = DTYPES.iter().flat_map(|&dtype| shapes.iter().enumerate().map(move |(i, dims)| value(i, dims, dtype)));
    let mixed = vec![value(0, &[2, 2], DType::BF16), none(false), value(1, &[3], DType::F32), none(true)];
    let mut messages: Vec<_> = each.map(|value| vec![value]).collect();
    messages.extend([vec![], mixed, vec![none(false)], vec![value(3, &[400, 900], DType::F32)]]);
    messages
}

fn wait(receive: P2pReceive) -> Result<Vec<P2pValue<Flex>>, Error> {
    receive.wait(&Default::default())
}

/// Runs the communicators of a world of threads.
fn in_world<R: Send>(world: usize, law: impl Fn(&AsyncCommunicator) -> R + Sync) -> Vec<R> {
    threads::run(world, |group| law(&AsyncCommunicator::new(Box::new(group))))
}

#[test]
fn what_is_received_is_what_was_sent() {
    in_world(2, |communicator| {
        let mut p2p = P2p::new(communicator);
        let other = 1 - communicator.rank();
        for message in messages() {
            p2p.send(other, message).unwrap();
        }
        for expected in messages() {
            assert_eq!(content(wait(p2p.recv(other).unwrap()).unwrap()), content(expected));
        }
        p2p.finish().unwrap();
    });
}

/// Every rank opens all receives of a step before anything is sent, from both neighbours, and waits for them in reverse
/// order; meanwhile the same communicator runs collectives.
#[test]
fn open_receives_stop_nothing_and_keep_their_order() {
    const MESSAGES: usize = 20;
    let number = |from: usize, to: usize, message: usize| (from * 4 + to) * MESSAGES + message;
    in_world(4, |communicator| {
        let (rank, mut p2p) = (communicator.rank(), P2p::new(communicator));
        let neighbours: Vec<usize> = [rank.wrapping_sub(1), rank + 1].into_iter().filter(|&rank| rank < 4).collect();
        let all = || (0..MESSAGES).flat_map(|message| neighbours.iter().map(move |&other| (other, message)));
        let receives: Vec<_> = all().map(|(other, message)| (other, message, p2p.recv(other).unwrap())).collect();
        let sum = |value: f32| {
            let reduce = communicator.submit("all_reduce", move |group| {
                let mut sum = [value];
                group.all_reduce(&mut sum).map(|()| sum[0])
            });
            reduce.wait().unwrap()
        };
        assert_eq!(sum(1.0), 4.0);
        for (other, message) in all() {
            // Sizes differ, so that a message in the wrong place cannot pass.
            p2p.send(other, vec![value(number(rank, other, message), &[message], DType::F32)]).unwrap();
        }
        assert_eq!(sum(2.0), 8.0);
        for (other, message, receive) in receives.into_iter().rev() {
            let expected = value(number(other, rank, message), &[message], DType::F32);
            assert_eq!(content(wait(receive).unwrap()), content(vec![expected]), "{message} from {other} to {rank}");
        }
        p2p.finish().unwrap();
    });
}

#[test]
fn elements_are_sent_and_headers_are_control_data() {
    let sent = in_world(2, |communicator| {
        let mut p2p = P2p::new(communicator);
        if communicator.rank() == 0 {
            let absent = P2pValue { tensor: None, requires_grad: false };
            p2p.send(1, vec![value(0, &[3, 5], DType::F32), absent, value(1, &[7], DType::BF16)]).unwrap();
        } else {
            wait(p2p.recv(0).unwrap()).unwrap();
        }
        p2p.finish().unwrap();
        communicator.traffic()
    });
    // A count of 4 bytes; 3 bytes and 8 per dimension for a tensor; 1 byte for nothing.
    assert_eq!(sent[0].control, CommVolume { elements: 8, bytes: 4 + (3 + 16) + 1 + (3 + 8) });
    assert_eq!(sent[0].sent, CommVolume { elements: 15 + 7, bytes: 15 * 4 + 7 * 2 });
    assert_eq!((sent[0].reduced, sent[0].gathered), Default::default());
    assert_eq!(sent[1], Default::default());
}

/// Rank 0 of the axis is rank 2 of the world, and its messages come from rank 1, which is rank 1 of the world.
fn on_reversed_axis(
    sender: impl Fn(&mut dyn Communicator) -> Result<(), Error> + Sync,
    deadline: Duration,
) -> Vec<Option<Error>> {
    threads::run(3, |group: ProcessGroup| {
        let mut group = group.with_deadline(deadline);
        let rank = group.rank();
        let mut axis = group.split(usize::from(rank == 0), 3 - rank).unwrap();
        match rank {
            0 => None,
            1 => sender(axis.as_mut()).err(),
            _ => wait(P2p::new(&AsyncCommunicator::new(axis)).recv(1).unwrap()).err(),
        }
    })
}

#[test]
fn a_lost_sender_is_named_by_its_number_in_the_world() {
    let error = on_reversed_axis(|_| Ok(()), Duration::from_secs(60)).remove(2).unwrap();
    assert!(matches!(error, Error::Communication(CommError::Lost { rank: 1, waited: None, .. })), "{error}");
    let silent = |group: &mut dyn Communicator| {
        group.compute_lock().unlocked(|| std::thread::sleep(Duration::from_secs(1)));
        Ok(())
    };
    let error = on_reversed_axis(silent, Duration::from_millis(200)).remove(2).unwrap();
    assert!(matches!(error, Error::Communication(CommError::Lost { rank: 1, waited: Some(_), .. })), "{error}");
}

#[test]
fn a_message_that_cannot_be_read_is_an_error_that_names_both_ranks() {
    let mut one = vec![1, 0, 0, 0, 1, 0, 1];
    one.extend(2u64.to_le_bytes());
    let with = |position: usize, byte: u8| {
        let mut bytes = one.clone();
        bytes[position] = byte;
        bytes.extend([0; 8]);
        bytes
    };
    let mut long = with(0, 1);
    long.push(0);
    let huge = [&[1u8, 0, 0, 0, 1, 0, 2][..], &u64::MAX.to_le_bytes(), &2u64.to_le_bytes()].concat();
    for (bytes, expected, found) in [
        (vec![], "4 bytes of a number of values", "a message that has 0 bytes left"),
        (one.clone(), "8 bytes of elements", "a message that has 0 bytes left"),
        (one[..9].to_vec(), "8 bytes of a shape", "a message that has 2 bytes left"),
        (with(4, 4), "a kind of value from 0 to 3", "4"),
        (with(5, 3), "a dtype from 0 to 2", "3"),
        (with(0, 255), "1 bytes of the kind of a value", "a message that has 0 bytes left"),
        (long, "the end of the message", "1 bytes more"),
        (huge, "a shape that fits the memory", "[18446744073709551615, 2]"),
    ] {
        let send = |group: &mut dyn Communicator| {
            let message = Message { to: 0, bytes: bytes.clone() };
            group.exchange(Operation::SendObject, vec![message], &[]).map(drop)
        };
        let error = on_reversed_axis(send, Duration::from_secs(60)).remove(2).unwrap().to_string();
        let start = format!("rank 2: message from rank 1: expected {expected}, found {found}; do all ranks run");
        assert!(error.starts_with(&start), "{error} is not {start}");
    }
}

#[test]
fn what_cannot_be_sent_is_refused_at_once() {
    in_world(2, |communicator| {
        let mut p2p = P2p::new(communicator);
        for rank in [communicator.rank(), 2] {
            for error in [p2p.send::<Flex>(rank, vec![]).unwrap_err(), p2p.recv(rank).unwrap_err()] {
                assert!(
                    matches!(error, Error::Communication(CommError::UnknownRank { rank: found, .. }) if found == rank),
                    "{error}"
                );
            }
        }
        let value = P2pValue { tensor: Some(tensor(&[1.0], &[1], DType::F64)), requires_grad: false };
        let error = p2p.send(1 - communicator.rank(), vec![value]).unwrap_err().to_string();
        assert!(error.contains("expected a tensor in f32, f16 or bf16, found one in F64"), "{error}");
        p2p.finish().unwrap();
    });
}
