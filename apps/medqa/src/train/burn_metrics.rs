//! Loss and throughput as burn-train's metrics.

use burn::train::{
    ItemLazy,
    metric::{
        Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry,
        SerializedEntry,
        state::{FormatOptions, NumericMetricState},
    },
};
use std::{marker::PhantomData, sync::Arc};

/// The metrics of a step or an evaluation.
#[derive(Debug, Clone, Default)]
pub(super) struct StepMetrics {
    /// Mean loss per target token, in nats.
    pub loss: f64,
    /// The number of target tokens.
    pub target_tokens: usize,
    /// Input tokens per second.
    pub tokens_per_second: f64,
}

impl ItemLazy for StepMetrics {
    type ItemSync = Self;

    fn sync(self) -> Self {
        self
    }
}

/// The input of a metric that is one number.
pub(super) trait MetricInput: Send + Sync + 'static {
    const NAME: &'static str;
    const UNIT: Option<&'static str>;
    const HIGHER_IS_BETTER: bool;
    fn value(&self) -> f64;
    /// Returns its weight in a mean.
    fn weight(&self) -> usize;
}

/// The mean loss per target token, in nats.
pub(super) struct LossInput {
    loss: f64,
    target_tokens: usize,
}

impl MetricInput for LossInput {
    const NAME: &'static str = "Loss";
    const UNIT: Option<&'static str> = None;
    const HIGHER_IS_BETTER: bool = false;

    fn value(&self) -> f64 {
        self.loss
    }

    fn weight(&self) -> usize {
        self.target_tokens
    }
}

impl Adaptor<LossInput> for StepMetrics {
    fn adapt(&self) -> LossInput {
        LossInput { loss: self.loss, target_tokens: self.target_tokens }
    }
}

/// Input tokens per second, without padding.
pub(super) struct ThroughputInput(f64);

impl MetricInput for ThroughputInput {
    const NAME: &'static str = "Speed";
    const UNIT: Option<&'static str> = Some("tokens/s");
    const HIGHER_IS_BETTER: bool = true;

    fn value(&self) -> f64 {
        self.0
    }

    fn weight(&self) -> usize {
        1
    }
}

impl Adaptor<ThroughputInput> for StepMetrics {
    fn adapt(&self) -> ThroughputInput {
        ThroughputInput(self.tokens_per_second)
    }
}

/// A metric of burn-train for one number.
pub(super) struct NumericMetric<N> {
    name: MetricName,
    state: NumericMetricState,
    input: PhantomData<fn(N)>,
}

impl<N: MetricInput> NumericMetric<N> {
    pub(super) fn new() -> Self {
        Self { name: Arc::new(N::NAME.to_owned()), state: NumericMetricState::new(), input: PhantomData }
    }
}

impl<N> Clone for NumericMetric<N> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), state: self.state.clone(), input: PhantomData }
    }
}

impl<N: MetricInput> Metric for NumericMetric<N> {
    type Input = N;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes { unit: N::UNIT.map(str::to_owned), higher_is_better: N::HIGHER_IS_BETTER }.into()
    }

    fn update(&mut self, item: &N, _: &MetricMetadata) -> SerializedEntry {
        let format = FormatOptions::new(self.name.clone()).precision(4);
        let format =
            N::UNIT.map_or_else(|| format, |unit| FormatOptions::new(self.name.clone()).precision(0).unit(unit));
        self.state.update(item.value(), item.weight().max(1), format)
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl<N: MetricInput> Numeric for NumericMetric<N> {
    fn value(&self) -> NumericEntry {
        self.state.current_value()
    }

    fn running_value(&self) -> NumericEntry {
        self.state.running_value()
    }
}
