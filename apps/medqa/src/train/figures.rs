//! Losses and speeds as burn-train's metrics.

use burn::train::{
    ItemLazy,
    metric::{
        Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry,
        SerializedEntry,
        state::{FormatOptions, NumericMetricState},
    },
};
use std::{marker::PhantomData, sync::Arc};

/// A step or an evaluation as numbers.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Mean per target token, in nats.
    pub loss: f64,
    /// Target tokens.
    pub targets: usize,
    /// Input tokens per second.
    pub speed: f64,
}

impl ItemLazy for Figures {
    type ItemSync = Self;

    fn sync(self) -> Self {
        self
    }
}

/// What a metric of one number needs to know.
pub trait Number: Send + Sync + 'static {
    const NAME: &'static str;
    const UNIT: Option<&'static str>;
    const HIGHER_IS_BETTER: bool;
    fn value(&self) -> f64;
    /// How much it counts in a mean.
    fn weight(&self) -> usize;
}

/// The mean loss per target token, in nats.
pub struct Loss(f64, usize);

impl Number for Loss {
    const NAME: &'static str = "Loss";
    const UNIT: Option<&'static str> = None;
    const HIGHER_IS_BETTER: bool = false;

    fn value(&self) -> f64 {
        self.0
    }

    fn weight(&self) -> usize {
        self.1
    }
}

impl Adaptor<Loss> for Figures {
    fn adapt(&self) -> Loss {
        Loss(self.loss, self.targets)
    }
}

/// Input tokens per second, padding aside.
pub struct Speed(f64);

impl Number for Speed {
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

impl Adaptor<Speed> for Figures {
    fn adapt(&self) -> Speed {
        Speed(self.speed)
    }
}

/// burn-train's metric of one number.
pub struct Figure<N> {
    name: MetricName,
    state: NumericMetricState,
    number: PhantomData<fn(N)>,
}

impl<N: Number> Figure<N> {
    pub fn new() -> Self {
        Self { name: Arc::new(N::NAME.to_owned()), state: NumericMetricState::new(), number: PhantomData }
    }
}

impl<N> Clone for Figure<N> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), state: self.state.clone(), number: PhantomData }
    }
}

impl<N: Number> Metric for Figure<N> {
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

impl<N: Number> Numeric for Figure<N> {
    fn value(&self) -> NumericEntry {
        self.state.current_value()
    }

    fn running_value(&self) -> NumericEntry {
        self.state.running_value()
    }
}
