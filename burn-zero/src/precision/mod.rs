//! Half-precision training: loss scaling, which keeps small gradients from rounding to zero.

mod loss_scaler;

pub use loss_scaler::{DynamicScale, LossScaler};
