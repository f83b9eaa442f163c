//! llama.cpp's order of the rows of query and key projections.

/// The heads to which the rows of a tensor belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowHeads {
    /// The query heads.
    Query,
    /// The key heads.
    Key,
}

impl RowHeads {
    /// Returns the heads of the tensor with a GGUF name, `None` if its rows are never permuted.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        let (_, part) = name.strip_prefix("blk.")?.split_once('.')?;
        match part {
            "attn_q.weight" | "attn_q.bias" => Some(Self::Query),
            "attn_k.weight" | "attn_k.bias" => Some(Self::Key),
            _ => None,
        }
    }
}

/// Returns true if files of this architecture interleave the two halves of each query and key head. For `llama`,
/// llama.cpp applies RoPE to adjacent pairs of rows; for other architectures, to the two halves of a head.
pub(super) fn is_permuted(architecture: &str) -> bool {
    architecture == "llama"
}

/// Returns the position in the file of row `index` of a query or key projection: row `half * head_dim / 2 + pair` of a
/// head is stored as its row `pair * 2 + half`.
pub(super) fn permuted_row(index: usize, head_dim: usize) -> usize {
    let (head, row) = (index / head_dim, index % head_dim);
    let (half, pair) = (row / (head_dim / 2), row % (head_dim / 2));
    head * head_dim + pair * 2 + half
}

/// Returns the row that is stored at position `stored` of the file: the inverse of [`permuted_row`].
pub(super) fn original_row(stored: usize, head_dim: usize) -> usize {
    let (head, row) = (stored / head_dim, stored % head_dim);
    head * head_dim + row % 2 * (head_dim / 2) + row / 2
}

#[cfg(test)]
mod tests {
    use super::{original_row, permuted_row};

    #[test]
    fn rows_of_a_head_are_stored_in_pairs() {
        let stored: Vec<_> = (0..8).map(|row| permuted_row(row, 4)).collect();
        assert_eq!(stored, [0, 2, 1, 3, 4, 6, 5, 7]);
        assert!((0..96).all(|row| original_row(permuted_row(row, 12), 12) == row));
    }
}
