//! PubMedQA's official metrics, over pairs of (prediction, gold).

use std::collections::BTreeSet;

/// Returns the fraction of correct predictions.
pub(super) fn accuracy(pairs: &[(&str, &str)]) -> f64 {
    pairs.iter().filter(|(prediction, gold)| prediction == gold).count() as f64 / pairs.len() as f64
}

/// Returns the macro F1 score: the mean, over all labels that occur as prediction or gold, of the harmonic mean of
/// precision and recall, which is 0 where both are 0.
pub(super) fn macro_f1(pairs: &[(&str, &str)]) -> f64 {
    let labels: BTreeSet<&str> = pairs.iter().flat_map(|&(prediction, gold)| [prediction, gold]).collect();
    let f1 = |label: &&str| {
        let hit = pairs.iter().filter(|(p, g)| p == label && g == label).count() as f64;
        let (predicted, gold) =
            (pairs.iter().filter(|(p, _)| p == label).count(), pairs.iter().filter(|(_, g)| g == label).count());
        2.0 * hit / (predicted + gold) as f64
    };
    labels.iter().map(f1).sum::<f64>() / labels.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_majority_class_scores_as_published() {
        let gold = [("yes", 276), ("no", 169), ("maybe", 55)];
        let pairs: Vec<_> = gold.iter().flat_map(|&(g, n)| std::iter::repeat_n(("yes", g), n)).collect();
        assert!((accuracy(&pairs) - 0.552).abs() < 5e-4);
        assert!((macro_f1(&pairs) - 0.2371).abs() < 5e-5);
    }
}
