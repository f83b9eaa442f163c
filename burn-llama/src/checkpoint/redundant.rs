//! Tensors that a checkpoint stores although the model shares or computes them: they must say the same.

use super::{Checkpoint, TensorFiles};
use crate::{Error, MismatchedTensor, TensorMismatch, rope::RopeScaling};
use burn::tensor::DType;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Returns true for the tables of rotary frequencies that old versions of `transformers` saved.
pub(super) fn is_rotary_table(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}

impl Checkpoint {
    /// Unties the model if its configuration ties the output head to the embedding, but the files hold another head:
    /// that head is used, as in `transformers` 5.
    ///
    /// # Errors
    /// If the two have different shapes, or are stored in a type that is not supported.
    pub(super) fn keep_own_head(&mut self) -> Result<(), Error> {
        let TensorFiles::HuggingFace(shards) = &self.files else { return Ok(()) };
        if self.config.tie_word_embeddings && shards.contains(HEAD) && !shards.same(HEAD, EMBEDDING)? {
            self.config.untie();
        }
        Ok(())
    }

    /// Compares a stored table of rotary frequencies with those of the configuration, scaled or not: how far a table
    /// was scaled has changed between versions of `transformers`, which never reads it.
    pub(super) fn check_rotary_table(&self, name: String, mismatch: &mut TensorMismatch) -> Result<(), Error> {
        let found: Vec<f32> = self.read(&name, DType::F32)?.iter::<f32>().collect();
        let (head_dim, theta) = (self.config.head_dim, self.config.rope_theta);
        let same = |scaling: &RopeScaling| {
            let expected = scaling.frequencies(head_dim, theta);
            // Tables in 16 bits are rounded to a part in 256, and f16 has steps of 6e-8 near zero.
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() / 128.0 + 6e-8;
            found.len() == expected.len() && found.iter().zip(&expected).all(close)
        };
        if !same(&RopeScaling::None) && !same(&self.config.rope_scaling) {
            let expected = format!("{} frequencies of rope_theta = {theta}", head_dim / 2);
            let found = format!("{} from {:?} to {:?}", found.len(), found.first(), found.last());
            mismatch.mismatched.push(MismatchedTensor { name, expected, found });
        }
        Ok(())
    }
}
