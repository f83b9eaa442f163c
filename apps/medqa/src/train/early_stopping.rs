//! Early stopping: the decision to end a run whose validation loss no longer improves.

/// The rule of early stopping, with the evaluations of a run so far.
#[derive(Debug, Clone)]
pub(super) struct EarlyStopping {
    /// Evaluations without improvement after which the run ends.
    patience: usize,
    /// Evaluations so far.
    evaluations: usize,
    /// The evaluation with the lowest loss, counted from 1.
    best_evaluation: usize,
    best_loss: f64,
}

impl EarlyStopping {
    /// Returns the rule before the first evaluation.
    pub(super) fn new(patience: usize) -> Self {
        Self { patience, evaluations: 0, best_evaluation: 1, best_loss: f64::MAX }
    }

    /// Returns the rule after evaluations with these losses, oldest first.
    pub(super) fn after(patience: usize, valid_losses: impl IntoIterator<Item = f64>) -> Self {
        let mut rule = Self::new(patience);
        for loss in valid_losses {
            rule.observe(loss);
        }
        rule
    }

    /// Takes the loss of the next evaluation; returns whether the best loss is `patience` evaluations old. A loss that
    /// is not finite does not count as an evaluation.
    pub(super) fn observe(&mut self, valid_loss: f64) -> bool {
        if !valid_loss.is_finite() {
            return false;
        }
        self.evaluations += 1;
        if valid_loss < self.best_loss {
            (self.best_loss, self.best_evaluation) = (valid_loss, self.evaluations);
        }
        self.evaluations - self.best_evaluation >= self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the evaluation after which a run with these losses ends, counted from 1.
    fn end(patience: usize, losses: &[f64]) -> Option<usize> {
        let mut rule = EarlyStopping::new(patience);
        losses.iter().position(|&loss| rule.observe(loss)).map(|index| index + 1)
    }

    #[test]
    fn a_run_ends_when_the_best_loss_is_as_old_as_the_patience() {
        assert_eq!(end(1, &[3.0, 2.0, 1.0]), None);
        assert_eq!(end(1, &[3.0, 2.0, 2.5, 1.0]), Some(3));
        assert_eq!(end(2, &[3.0, 2.0, 2.5, 1.0, 4.0, 5.0]), Some(6));
        assert_eq!(end(2, &[1.0, 4.0, 0.5, 4.0]), None);
        assert_eq!(end(3, &[]), None);
    }

    #[test]
    fn an_equal_loss_is_no_improvement() {
        assert_eq!(end(2, &[1.0, 1.0, 1.0]), Some(3));
    }

    #[test]
    fn losses_that_are_not_finite_do_not_count() {
        assert_eq!(end(2, &[1.0, f64::NAN, f64::INFINITY, 2.0, f64::NAN, 2.0]), Some(6));
        assert_eq!(end(1, &[f64::NAN, f64::NAN, 1.0]), None);
    }

    #[test]
    fn a_resumed_run_ends_where_the_whole_run_does() {
        let losses = [3.0, 1.0, 2.0, f64::NAN, 1.5, 0.9, 2.0, 2.0, 2.0];
        for patience in 1..5 {
            let whole = end(patience, &losses);
            for resume in 0..whole.unwrap_or(losses.len()) {
                let mut rule = EarlyStopping::after(patience, losses[..resume].iter().copied());
                let rest = losses[resume..].iter().position(|&loss| rule.observe(loss));
                assert_eq!(rest.map(|index| resume + index + 1), whole, "patience {patience}, resumed after {resume}");
            }
        }
    }
}
