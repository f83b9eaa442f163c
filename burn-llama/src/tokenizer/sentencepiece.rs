//! SentencePiece BPE as in llama.cpp: the adjacent pair whose token has the highest score is merged first; of pairs
//! with equal scores, the leftmost.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

/// The character that SentencePiece writes for a space.
pub(super) const SPACE_SYMBOL: char = '\u{2581}';

/// A candidate merge: two adjacent symbols that together are a token.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    /// Length of both symbols together in bytes. If it no longer matches, one of them has been merged and the candidate
    /// is stale.
    bytes: usize,
}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Merge {}

/// A span of the text that is one piece so far; empty once it has been merged into its left neighbour.
struct Symbol {
    start: usize,
    bytes: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

/// Splits a text, with spaces already written as [`SPACE_SYMBOL`], into the pieces that remain when no more merges are
/// possible.
///
/// `score` returns the score of a token; none if the text is no token that merges may lead to.
pub(super) fn pieces(text: &str, score: impl Fn(&str) -> Option<f32>) -> Vec<&str> {
    let mut pieces: Vec<Symbol> = text
        .char_indices()
        .enumerate()
        .map(|(index, (start, c))| Symbol {
            start,
            bytes: c.len_utf8(),
            prev: index.checked_sub(1),
            next: (start + c.len_utf8() < text.len()).then_some(index + 1),
        })
        .collect();
    let mut queue = BinaryHeap::new();
    let propose = |pieces: &[Symbol], left: Option<usize>, right: Option<usize>, queue: &mut BinaryHeap<Merge>| {
        let (Some(left), Some(right)) = (left, right) else { return };
        let bytes = pieces[left].bytes + pieces[right].bytes;
        let token = &text[pieces[left].start..][..bytes];
        if let Some(score) = score(token) {
            // Adding zero turns -0.0 into 0.0: llama.cpp compares them as equal, `total_cmp` does not.
            queue.push(Merge { score: score + 0.0, left, right, bytes });
        }
    };
    for right in 1..pieces.len() {
        propose(&pieces, Some(right - 1), Some(right), &mut queue);
    }
    while let Some(Merge { left, right, bytes, .. }) = queue.pop() {
        let stale = pieces[left].bytes == 0 || pieces[right].bytes == 0;
        if stale || pieces[left].bytes + pieces[right].bytes != bytes {
            continue;
        }
        pieces[left].bytes = bytes;
        pieces[right].bytes = 0;
        let after = pieces[right].next;
        pieces[left].next = after;
        if let Some(after) = after {
            pieces[after].prev = Some(left);
        }
        let before = pieces[left].prev;
        propose(&pieces, before, Some(left), &mut queue);
        propose(&pieces, Some(left), after, &mut queue);
    }
    pieces.iter().filter(|piece| piece.bytes > 0).map(|piece| &text[piece.start..][..piece.bytes]).collect()
}

/// Returns the list of merges that corresponds to [`pieces`], best first: every way to compose a token from two others,
/// by descending score.
pub(super) fn merges(tokens: &[String], ids: &HashMap<String, u32>, scores: &[f32]) -> Vec<(String, String)> {
    let mut merges = Vec::new();
    for (token, score) in tokens.iter().zip(scores) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((score + 0.0, left.to_owned(), right.to_owned()));
            }
        }
    }
    merges.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    merges.into_iter().map(|(_, left, right)| (left, right)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_score_merges_first_and_the_leftmost_of_equals() {
        let mut tokens = vec![("a", -9.0), ("b", -9.0), ("ab", -2.0), ("ba", -1.0), ("aba", -5.0)];
        let split = |text: &'static str, tokens: &[(&str, f32)]| {
            pieces(text, |piece| tokens.iter().find(|(token, _)| *token == piece).map(|(_, score)| *score))
        };
        assert_eq!(split("abab", &tokens), ["aba", "b"]);
        tokens[3].1 = -2.0;
        assert_eq!(split("abab", &tokens), ["ab", "ab"]);
        assert_eq!(split("", &tokens), [""; 0]);
        assert_eq!(split("xéa", &tokens), ["x", "é", "a"]);
    }
}
