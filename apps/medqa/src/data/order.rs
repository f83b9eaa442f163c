//! The order of rows, as a function of seed and epoch.

use burn_peft::random;

/// The rows of one epoch over sources of the given sizes and weights, as (source, row). A weight of 2.5 shows every row twice and
/// half of them, drawn anew in every epoch, a third time. Without shuffling, sources follow each other in their own order.
pub fn epoch_order(sources: &[(usize, f64)], seed: u64, epoch: u64, shuffle: bool) -> Vec<(usize, usize)> {
    let mut order = Vec::new();
    for (source, &(len, weight)) in sources.iter().enumerate() {
        for _ in 0..weight as usize {
            order.extend((0..len).map(|row| (source, row)));
        }
        let extra = (weight.fract() * len as f64).round() as usize;
        let mut drawn: Vec<usize> = (0..len).collect();
        permute(&mut drawn, random::key(&[seed, epoch, source as u64, 1]));
        drawn.truncate(extra);
        drawn.sort_unstable();
        order.extend(drawn.into_iter().map(|row| (source, row)));
    }
    if shuffle {
        permute(&mut order, random::key(&[seed, epoch, 0, 2]));
    }
    order
}

/// Fisher and Yates's shuffle.
fn permute<T>(items: &mut [T], key: u64) {
    for i in (1..items.len()).rev() {
        let j = (random::uniform(key, i as u64) * (i + 1) as f64) as usize;
        items.swap(i, j);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_shows_every_row_once_and_differs_from_the_next() {
        let (first, second) = (epoch_order(&[(100, 1.0)], 7, 0, true), epoch_order(&[(100, 1.0)], 7, 1, true));
        assert_ne!(first, second);
        assert_eq!(first, epoch_order(&[(100, 1.0)], 7, 0, true));
        let mut sorted = first;
        sorted.sort_unstable();
        assert_eq!(sorted, epoch_order(&[(100, 1.0)], 7, 0, false));
    }

    #[test]
    fn weights_count_rows() {
        let order = epoch_order(&[(10, 2.5), (10, 0.3)], 1, 0, false);
        assert_eq!(order.iter().filter(|(source, _)| *source == 0).count(), 25);
        assert_eq!(order.iter().filter(|(source, _)| *source == 1).count(), 3);
    }
}
