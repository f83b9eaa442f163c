//! The partition of a model's segments into stages.

use super::PipelineError;
use std::ops::Range;

/// A method to partition segments into stages (DeepSpeed's `partition_method`). A stage is one or more consecutive
/// segments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PartitionMethod {
    /// Equal numbers of segments (DeepSpeed's `uniform`). If they do not divide evenly, the first stages have one
    /// segment more.
    Uniform,
    /// The lightest possible heaviest stage (DeepSpeed's `parameters`, where the weight of a segment is its number of
    /// trainable parameters). Of the partitions with this maximum it is the most even one, with the smallest sum of
    /// squared weights.
    Parameters,
    /// The lightest possible heaviest stage, as with `Parameters`, where these are the weights of the segments: their
    /// times in nanoseconds ([`super::TraceFile::segment_times`]) or their operations
    /// ([`crate::estimate::LlamaShape::segment_flops`]).
    Weighted(Vec<u64>),
    /// An explicit number of segments for each stage.
    Explicit(Vec<usize>),
}

impl PartitionMethod {
    /// Returns the segments of each of `stages` stages; `weights[i]` is the weight of segment `i` for `Parameters`.
    ///
    /// # Errors
    /// If there are fewer segments than stages, `Weighted` has not one weight per segment, or an explicit list does not
    /// add up to all segments.
    pub fn split(&self, weights: &[u64], stages: usize) -> Result<Vec<Range<usize>>, PipelineError> {
        let segments = weights.len();
        if stages == 0 || stages > segments {
            let expected = format!("between 1 and {segments}, the number of segments");
            return Err(PipelineError::Setting { field: "stages", expected, found: stages.to_string() });
        }
        Ok(sizes_to_ranges(match self {
            Self::Uniform => (0..stages).map(|s| segments / stages + usize::from(s < segments % stages)).collect(),
            Self::Parameters => partition_balanced(weights, stages),
            Self::Weighted(own) if own.len() != segments => {
                let (expected, found) = (format!("{segments} weights, one per segment"), own.len().to_string());
                return Err(PipelineError::Setting { field: "partition", expected, found });
            }
            Self::Weighted(own) => partition_balanced(own, stages),
            Self::Explicit(sizes) => {
                if sizes.len() != stages || sizes.contains(&0) || sizes.iter().sum::<usize>() != segments {
                    let expected = format!("{stages} numbers above 0 with the sum {segments}");
                    return Err(PipelineError::Setting { field: "partition", expected, found: format!("{sizes:?}") });
                }
                sizes.clone()
            }
        }))
    }
}

fn sizes_to_ranges(sizes: Vec<usize>) -> Vec<Range<usize>> {
    let ends = sizes.iter().scan(0, |end, size| {
        *end += size;
        Some(*end)
    });
    ends.zip(&sizes).map(|(end, size)| end - size..end).collect()
}

/// Returns the sizes of the parts. A first search finds the smallest maximum weight, a second the most even parts
/// within it. One search cannot find both, because the best start of the most even partition need not have the smallest
/// maximum.
fn partition_balanced(weights: &[u64], parts: usize) -> Vec<usize> {
    let heaviest = optimal_sizes(weights, parts, |sum, rest| rest.max(sum));
    let limit = part_weights(weights, &heaviest).max().unwrap_or(0);
    // A part above the limit costs more than all other parts together can.
    let total: u128 = weights.iter().map(|&weight| u128::from(weight)).sum();
    optimal_sizes(weights, parts, |sum, rest| {
        rest.saturating_add(if sum > limit { total.saturating_mul(total).saturating_add(1) } else { sum * sum })
    })
}

fn part_weights(weights: &[u64], sizes: &[usize]) -> impl Iterator<Item = u128> {
    sizes_to_ranges(sizes.to_vec()).into_iter().map(|part| weights[part].iter().map(|&weight| u128::from(weight)).sum())
}

/// Returns the sizes of `parts` non-empty parts with the smallest cost. The cost of a part of weight `sum` followed by
/// parts of cost `rest` is `join(sum, rest)`. Uses dynamic programming from the end, in `O(parts · n²)`.
fn optimal_sizes(weights: &[u64], parts: usize, join: impl Fn(u128, u128) -> u128) -> Vec<usize> {
    let n = weights.len();
    // best[i] is the smallest cost of partitioning segments i.. into the number of parts so far; first[k][i] also has
    // the size of the first part.
    let mut best: Vec<Option<u128>> = vec![None; n + 1];
    best[n] = Some(0);
    let mut first = Vec::new();
    for _ in 0..parts {
        let choose = |start: usize| {
            let mut sum = 0;
            let ends = (start + 1..=n).filter_map(|end| {
                sum += u128::from(weights[end - 1]);
                Some((join(sum, best[end]?), end - start))
            });
            ends.min()
        };
        let level: Vec<_> = (0..=n).map(choose).collect();
        best = level.iter().map(|choice| choice.map(|(cost, _)| cost)).collect();
        first.push(level);
    }
    let mut start = 0;
    let sizes = first.iter().rev().map(|level| {
        let size = level[start].map_or(0, |(_, size)| size);
        start += size;
        size
    });
    sizes.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(partition: &PartitionMethod, weights: &[u64], stages: usize) -> Vec<usize> {
        partition.split(weights, stages).unwrap().iter().map(|part| part.end).collect()
    }

    fn sums(weights: &[u64], parts: &[Range<usize>]) -> Vec<u64> {
        parts.iter().map(|part| weights[part.clone()].iter().sum()).collect()
    }

    /// DeepSpeed's own test cases (`tests/unit/runtime/utils/test_partition_balanced.py`), with fractions as integers.
    #[test]
    fn the_golden_partitions_of_deepspeed_hold() {
        assert_eq!(ends(&PartitionMethod::Parameters, &[0, 1, 2, 3, 3, 3], 4), [3, 4, 5, 6]);
        assert_eq!(ends(&PartitionMethod::Parameters, &[0, 11, 300, 30], 3), [2, 3, 4]);
        assert_eq!(ends(&PartitionMethod::Parameters, &[1; 8], 4), [2, 4, 6, 8]);
        let weights = [1, 1, 1, 1, 0, 1];
        let sums = sums(&weights, &PartitionMethod::Parameters.split(&weights, 4).unwrap());
        assert_eq!(sums.iter().max().unwrap() - sums.iter().min().unwrap(), 1, "{sums:?}");
        assert_eq!(ends(&PartitionMethod::Uniform, &[1; 10], 4), [3, 6, 8, 10]);
        assert_eq!(ends(&PartitionMethod::Explicit(vec![1, 2, 3]), &[9; 6], 3), [1, 3, 6]);
    }

    /// Returns every partition of `n` segments into `parts` parts; a bit mask says where a part ends.
    fn all(n: usize, parts: usize) -> impl Iterator<Item = Vec<Range<usize>>> {
        (0..1_usize << (n - 1)).filter(move |bits| bits.count_ones() as usize == parts - 1).map(move |bits| {
            let mut ends: Vec<_> = (1..n).filter(|end| bits >> (end - 1) & 1 == 1).collect();
            ends.push(n);
            let starts = std::iter::once(0).chain(ends.clone());
            starts.zip(ends.clone()).map(|(start, end)| start..end).collect()
        })
    }

    #[test]
    fn partitions_are_contiguous_whole_and_the_best_there_are() {
        let score = |weights: &[u64], parts: &[Range<usize>]| {
            let sums = sums(weights, parts);
            (*sums.iter().max().unwrap(), sums.iter().map(|sum| sum * sum).sum::<u64>())
        };
        let mut seed = 1_u64;
        for case in 0..300 {
            let n = 1 + case % 9;
            let weights: Vec<u64> = std::iter::repeat_with(|| {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (seed >> 33) % [3, 10, 1000][case % 3]
            })
            .take(n)
            .collect();
            for stages in 1..=n {
                for partition in [PartitionMethod::Uniform, PartitionMethod::Parameters] {
                    let parts = partition.split(&weights, stages).unwrap();
                    assert_eq!(parts.len(), stages);
                    assert!(parts.iter().all(|part| !part.is_empty()), "{parts:?}");
                    assert_eq!(parts.iter().cloned().flatten().collect::<Vec<_>>(), (0..n).collect::<Vec<_>>());
                }
                let parts = PartitionMethod::Parameters.split(&weights, stages).unwrap();
                let weighted = PartitionMethod::Weighted(weights.clone()).split(&vec![1; n], stages);
                assert_eq!(weighted.as_ref(), Ok(&parts), "{weights:?} in {stages}");
                let best = all(n, stages).map(|parts| score(&weights, &parts)).min().unwrap();
                assert_eq!(score(&weights, &parts), best, "{weights:?} in {stages}: {parts:?}");
            }
        }
    }

    #[test]
    fn impossible_partitions_are_refused() {
        let message = |partition: PartitionMethod, stages| partition.split(&[1, 2, 1], stages).unwrap_err().to_string();
        let stages = "`stages`: expected between 1 and 3, the number of segments, found";
        assert_eq!(message(PartitionMethod::Parameters, 4), format!("{stages} 4"));
        assert_eq!(message(PartitionMethod::Uniform, 0), format!("{stages} 0"));
        assert_eq!(message(PartitionMethod::Weighted(vec![5; 3]), 7), format!("{stages} 7"));
        let weights = "`partition`: expected 3 weights, one per segment, found 2";
        assert_eq!(message(PartitionMethod::Weighted(vec![5; 2]), 2), weights);
        for sizes in [vec![1, 1], vec![1, 0, 2], vec![1, 1, 2], vec![3]] {
            let found = format!("{sizes:?}");
            let text = message(PartitionMethod::Explicit(sizes), 3);
            assert_eq!(text, format!("`partition`: expected 3 numbers above 0 with the sum 3, found {found}"));
        }
    }
}
