//! The operations of the segments of a LLaMA, by which its layers are divided among the stages of a pipeline.

use super::LlamaShape;

impl LlamaShape {
    /// Returns the floating-point operations of the matrix products in the forward pass of each segment, for a row of
    /// `tokens` tokens of which `targets` are predicted: 0 for the embedding, then an attention and an MLP block per
    /// layer, then the head.
    ///
    /// With `h` = `hidden`, `d` = `head_dim` and `H` and `K` heads of queries and keys, an attention block takes
    /// `2·T·h·d·2(H + K) + 4·T²·H·d`, an MLP block `6·T·h·intermediate`, and the head `2·targets·h·vocabulary`. A table
    /// that is embedding and head, and the prefixes of P-tuning, change nothing.
    pub fn segment_flops(&self, tokens: u64, targets: u64) -> Vec<u64> {
        let projections = 2 * tokens * self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads);
        let attention = projections + 4 * tokens * tokens * self.heads * self.head_dim;
        let mlp = 6 * tokens * self.hidden * self.intermediate;
        let head = 2 * targets * self.hidden * self.vocabulary;
        let layers = (0..self.layers).flat_map(|_| [attention, mlp]);
        std::iter::once(0).chain(layers).chain([head]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::PartitionMethod;

    #[test]
    fn every_product_is_counted() {
        let shape =
            LlamaShape { layers: 2, hidden: 12, intermediate: 20, heads: 3, kv_heads: 1, head_dim: 4, vocabulary: 50 };
        let (tokens, targets) = (7, 5);
        // A product of [T, a] and [a, b] takes 2·T·a·b: q, k, v, o, then scores and values of each head.
        let projections = 2 * tokens * 12 * (12 + 4 + 4 + 12);
        let attention = projections + 3 * 2 * (2 * tokens * 4 * tokens);
        let mlp = 3 * 2 * tokens * 12 * 20;
        let expected = [0, attention, mlp, attention, mlp, 2 * targets * 12 * 50];
        assert_eq!(shape.segment_flops(tokens, targets), expected);
    }

    /// SmolLM2-135M: if every token is a target, the head has a fifth of the operations, and the last of four stages
    /// with equal numbers of segments 1.6 times the mean.
    #[test]
    fn the_head_of_smollm2_moves_the_cuts() {
        let (layers, hidden, intermediate, vocabulary) = (30, 576, 1536, 49152);
        let shape = LlamaShape { layers, hidden, intermediate, heads: 9, kv_heads: 3, head_dim: 64, vocabulary };
        let flops = shape.segment_flops(16, 16);
        let total: u64 = flops.iter().sum();
        assert_eq!(flops[61] * 100 / total, 20);
        let heaviest = |method: PartitionMethod| {
            let parts = method.split(&flops, 4).unwrap();
            let sum = |part: std::ops::Range<usize>| flops[part].iter().sum::<u64>();
            (parts.len() as u64 * parts.into_iter().map(sum).max().unwrap()) as f64 / total as f64
        };
        assert!(heaviest(PartitionMethod::Uniform) > 1.5, "{}", heaviest(PartitionMethod::Uniform));
        let weighted = heaviest(PartitionMethod::Weighted(flops.clone()));
        assert!(weighted < 1.05, "{weighted}");
    }
}
