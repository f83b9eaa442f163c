//! Exchanges that are started and waited for in two steps, between threads; `examples/ranks.rs` does the same between
//! processes.

use super::*;
use crate::{Error, comm::exchange::wait_chain};
use std::time::Instant;

fn message(to: usize, byte: u8) -> Vec<Message> {
    vec![Message { to, bytes: vec![byte; usize::from(byte)] }]
}

#[test]
fn exchanges_with_one_peer_match_in_the_order_of_their_start() {
    const EXCHANGES: u8 = 30;
    threads::run(3, |mut group| {
        let (rank, peers) = (group.rank(), collective::peers(&group));
        let mut pairs = group.split(rank / 2, rank).unwrap();
        let byte = |from: usize, number: u8| number + 40 * from as u8;
        let mut receives = Vec::new();
        for number in 0..EXCHANGES {
            receives.push(group.start(Operation::Send, vec![], &peers).unwrap());
            if pairs.world_size() == 2 {
                // The other group has messages of its own between the same ranks.
                let sent = message(1 - pairs.rank(), 200 + number);
                drop(pairs.start(Operation::Send, sent, &[1 - pairs.rank()]).unwrap());
            }
        }
        // A receive that is dropped still takes its message.
        drop(receives.remove(7));
        for number in 0..EXCHANGES {
            for &to in &peers {
                group.start(Operation::Send, message(to, byte(rank, number)), &[]).unwrap().wait().unwrap();
            }
        }
        group.barrier().unwrap();
        let numbers = (0..EXCHANGES).filter(|&number| number != 7);
        for (number, receive) in numbers.zip(receives).collect::<Vec<_>>().into_iter().rev() {
            assert!(receive.is_done(), "{number} on rank {rank}");
            let expected = peers.iter().map(|&from| vec![byte(from, number); usize::from(byte(from, number))]);
            assert_eq!(receive.wait().unwrap(), expected.collect::<Vec<_>>(), "{number} on rank {rank}");
        }
    });
}

#[test]
fn a_receive_that_nobody_waits_for_has_no_deadline() {
    let deadline = Duration::from_millis(300);
    threads::run(2, |group| {
        let mut group = group.with_deadline(deadline);
        let other = 1 - group.rank();
        let late = group.start(Operation::Send, vec![], &[other]).unwrap();
        let lock = group.compute_lock();
        lock.unlocked(|| std::thread::sleep(2 * deadline));
        assert!(!late.is_done());
        if group.rank() == 0 {
            let start = Instant::now();
            let error = late.wait().unwrap_err();
            assert!(start.elapsed() >= deadline, "{:?}", start.elapsed());
            assert!(
                matches!(
                    error,
                    Error::Communication(CommError::Lost { operation: "send", rank: 1, waited: Some(_), .. })
                ),
                "{error}"
            );
        } else {
            lock.unlocked(|| std::thread::sleep(2 * deadline));
        }
    });
}

#[test]
fn an_exchange_with_a_rank_that_has_ended_is_done() {
    threads::run(2, |mut group| {
        if group.rank() == 1 {
            group.start(Operation::Send, message(0, 5), &[]).unwrap().wait().unwrap();
            return;
        }
        let [first, second] = [(); 2].map(|()| group.start(Operation::Send, vec![], &[1]).unwrap());
        while !second.is_done() {
            group.compute_lock().unlocked(std::thread::yield_now);
        }
        assert!(first.is_done());
        let error = second.wait().unwrap_err();
        assert!(matches!(error, Error::Communication(CommError::Lost { rank: 1, waited: None, .. })), "{error}");
        assert_eq!(first.wait().unwrap(), [vec![5; 5]]);
    });
}

/// Waits for a message of the rank before, from the last rank on, and returns the errors. With `answered`, rank 1 gets a
/// late message from rank 0 and then waits for nobody.
fn wait_in_a_chain(deadline: Duration, answered: bool) -> Vec<Option<String>> {
    threads::run(4, |group| {
        let mut group = group.with_deadline(deadline);
        let lock = group.compute_lock();
        let pause = |time: Duration| lock.unlocked(|| std::thread::sleep(time));
        let receive = |group: &mut dyn Communicator, from| group.exchange(Operation::Send, vec![], &[from]).err();
        let error = match group.rank() {
            0 => {
                pause(deadline * 2 / 3);
                if answered {
                    group.exchange(Operation::Send, message(1, 1), &[]).unwrap();
                }
                None
            }
            1 if answered => receive(&mut group, 0),
            // The last rank waits first, so that its deadline is the first to pass.
            1 => {
                pause(deadline / 6);
                receive(&mut group, 0)
            }
            2 => {
                pause(deadline / 12);
                receive(&mut group, 1)
            }
            _ => receive(&mut group, 2),
        };
        // A rank that has ended would be an error of its own.
        pause(deadline);
        error.map(|error| error.to_string())
    })
}

#[test]
fn a_rank_that_waits_for_a_lost_one_says_so() {
    let deadline = Duration::from_millis(1800);
    let errors = wait_in_a_chain(deadline, false);
    for (error, found) in errors.iter().zip([
        None,
        Some("send: rank 0 has not answered for 1.8 s; look at the output of rank 0 for the cause"),
        Some("send: rank 1, which waits for rank 0, has not answered for 1.8 s; look at the output of rank 0"),
        Some(
            "send: rank 2, which waits for rank 1, which waits for rank 0, has not answered for 1.8 s; look at the \
             output of rank 0",
        ),
    ]) {
        let starts = |error: &String| error.starts_with(found.unwrap_or("nothing"));
        assert!(error.as_ref().map_or(found.is_none(), starts), "{error:?} is not {found:?}");
    }
    let errors = wait_in_a_chain(deadline, true);
    assert_eq!((&errors[0], &errors[1]), (&None, &None));
    let error = errors[2].as_ref().unwrap();
    assert!(error.starts_with("send: rank 1 has not answered for 1.8 s; look at the output of rank 1"), "{error}");
}

#[test]
fn a_chain_of_waits_ends() {
    let chain = |waits: &[Option<usize>], rank| wait_chain(rank, |rank| waits[rank]);
    assert_eq!(chain(&[Some(1), Some(2), None], 0), [1, 2]);
    assert_eq!(chain(&[Some(1), Some(2), None], 2), [0; 0]);
    assert_eq!(chain(&[Some(1), Some(0)], 0), [1]);
    assert_eq!(chain(&[Some(1), Some(2), Some(1)], 0), [1, 2]);
    assert_eq!(chain(&[Some(0)], 0), [0; 0]);
}

/// A thread of a pool that waits for a message runs the jobs of the pool, on which the message may depend.
#[test]
fn a_thread_of_a_pool_works_while_it_waits() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    threads::run(2, |mut group| {
        if group.rank() == 0 {
            let receive = group.start(Operation::Send, vec![], &[1]).unwrap();
            let received = group.compute_lock().unlocked(|| pool.install(|| receive.wait()));
            assert_eq!(received.unwrap(), [vec![9; 9]]);
        } else {
            group.compute_lock().unlocked(|| {
                std::thread::sleep(Duration::from_millis(100));
                pool.install(|| group.start(Operation::Send, message(0, 9), &[]).unwrap().wait().unwrap());
            });
        }
    });
}

#[test]
fn a_complete_exchange_has_its_messages() {
    let exchange = Exchange::complete(Operation::Send, vec![vec![1], vec![]]);
    assert!(exchange.is_done());
    assert_eq!(exchange.wait().unwrap(), [vec![1], vec![]]);
    assert!(Solo.start(Operation::Send, vec![], &[]).unwrap().is_done());
    assert!(matches!(
        Solo.start(Operation::Send, vec![], &[1]),
        Err(Error::Communication(CommError::UnknownRank { rank: 1, world: 1, .. }))
    ));
}
