//! Rotary frequencies and their scaling, as in `modeling_rope_utils` of `transformers`.

use crate::Error;
use serde_json::{Value, json};
use std::f64::consts::PI;

/// The rule that scales the rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// The frequencies are not scaled.
    None,
    /// All frequencies are divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's rule: low frequencies are divided, high ones are kept, with a smooth ramp between.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length of pretraining.
        original: f64,
    },
    /// YaRN (Peng et al., 2023, arXiv:2309.00071).
    Yarn {
        /// The divisor of the low frequencies.
        factor: f64,
        /// The factor of cosines and sines.
        attention_factor: f64,
        /// The number of rotations in the original context at which the ramp starts.
        beta_fast: f64,
        /// The number of rotations in the original context at which the ramp ends.
        beta_slow: f64,
        /// True if the ends of the ramp are rounded to whole dimensions.
        truncate: bool,
        /// The context length of pretraining.
        original: f64,
    },
    /// One divisor per frequency, as in GGUF files.
    Factors(Vec<f64>),
    /// Frequencies that change beyond the original length; only positions up to it are supported.
    Dynamic {
        /// The length up to which the frequencies are not scaled.
        original: usize,
    },
}

impl RopeScaling {
    /// Reads `rope_parameters` or `rope_scaling`.
    ///
    /// # Errors
    /// Returns an error if the type is not supported or a factor is missing or impossible.
    pub fn from_json(value: Option<&Value>, max_positions: usize, head_dim: usize) -> Result<Self, Error> {
        let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(Self::None) };
        let kind = rope_type(value)?;
        let optional = |name: &str| match value.get(name).filter(|x| !x.is_null()) {
            None => Ok(None),
            Some(x) => match x.as_f64().filter(|&x| x > 0.0 && x.is_finite()) {
                Some(x) => Ok(Some(x)),
                None => Err(Error::config(format!("rope_scaling.{name}"), "a positive number", x)),
            },
        };
        let number = |name: &str| {
            optional(name)?.ok_or_else(|| Error::config(format!("rope_scaling.{name}"), "a positive number", value))
        };
        let original = optional("original_max_position_embeddings")?.unwrap_or(max_positions as f64);
        Ok(match kind {
            "default" => Self::None,
            "linear" => Self::Linear { factor: number("factor")? },
            "dynamic" => Self::Dynamic { original: original as usize },
            "llama3" => Self::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original: number("original_max_position_embeddings")?,
            },
            "yarn" => Self::Yarn {
                factor: number("factor")?,
                attention_factor: yarn_attention_factor(value, number("factor")?),
                beta_fast: optional("beta_fast")?.unwrap_or(32.0),
                beta_slow: optional("beta_slow")?.unwrap_or(1.0),
                truncate: match value.get("truncate").filter(|truncate| !truncate.is_null()) {
                    None => true,
                    Some(truncate) => truncate
                        .as_bool()
                        .ok_or_else(|| Error::config("rope_scaling.truncate", "true or false", truncate))?,
                },
                original,
            },
            "factors" => Self::Factors(factors(value, head_dim)?),
            found => {
                let expected = "default, linear, llama3, yarn or dynamic";
                return Err(Error::config("rope_scaling.rope_type", expected, found));
            }
        })
    }

    /// Returns the angle per position of each pair of features, `[head_dim / 2]`.
    pub fn frequencies(&self, head_dim: usize, theta: f64) -> Vec<f32> {
        let plain = (0..head_dim / 2).map(|i| theta.powf(-((2 * i) as f64) / head_dim as f64));
        plain.enumerate().map(|(i, f)| self.scale(i, f, head_dim, theta) as f32).collect()
    }

    /// Returns the factor of cosines and sines.
    pub fn attention_factor(&self) -> f64 {
        if let Self::Yarn { attention_factor, .. } = self { *attention_factor } else { 1.0 }
    }

    fn scale(&self, i: usize, frequency: f64, head_dim: usize, theta: f64) -> f64 {
        match self {
            Self::None | Self::Dynamic { .. } => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Factors(factors) => frequency / factors[i],
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let turns = original * frequency / (2.0 * PI);
                let smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
            Self::Yarn { factor, beta_fast, beta_slow, truncate, original, .. } => {
                let dimension =
                    |turns: f64| head_dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                let width = if high == low { 0.001 } else { high - low };
                let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
                frequency / factor * ramp + frequency * (1.0 - ramp)
            }
        }
    }

    /// Returns the divisor of each frequency, `[head_dim / 2]`, for the scalings that GGUF stores as
    /// `rope_freqs.weight`: Llama 3's and explicit divisors.
    pub fn divisors(&self, head_dim: usize, theta: f64) -> Option<Vec<f64>> {
        match self {
            Self::Factors(factors) => Some(factors.clone()),
            Self::Llama3 { .. } => {
                let plain = (0..head_dim / 2).map(|i| theta.powf(-((2 * i) as f64) / head_dim as f64));
                Some(plain.enumerate().map(|(i, f)| f / self.scale(i, f, head_dim, theta)).collect())
            }
            _ => None,
        }
    }

    /// Returns Llama 3's rule as `rope_scaling` if explicit divisors follow it with its usual factors of low and high
    /// frequencies, 1 and 4: `transformers` knows the rule, but not the divisors that a GGUF file stores.
    pub fn as_llama3(&self, head_dim: usize, theta: f64) -> Option<Value> {
        let Self::Factors(factors) = self else { return None };
        let (factor, low, high) = (factors.iter().copied().fold(1.0, f64::max), 1.0, 4.0);
        // A frequency on the ramp determines the context length of pretraining; without one, Llama 3's is taken.
        let ramp = factors.iter().enumerate().find(|&(_, &divisor)| divisor > 1.001 && divisor < factor * 0.999);
        let original = ramp.map_or(8192.0, |(i, divisor)| {
            let smooth = (1.0 / divisor - 1.0 / factor) / (1.0 - 1.0 / factor);
            let frequency = theta.powf(-((2 * i) as f64) / head_dim as f64);
            ((low + smooth * (high - low)) * 2.0 * PI / frequency).round()
        });
        let rule = Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original };
        let expected = rule.divisors(head_dim, theta)?;
        // The file stores the divisors in f32.
        let same = factors.iter().zip(&expected).all(|(found, expected)| (found / expected - 1.0).abs() < 1e-5);
        same.then(|| {
            json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original as u64,
            })
        })
    }

    /// Refuses lengths at which the frequencies would have to change.
    ///
    /// # Errors
    /// Returns an error if the scaling is dynamic and `length` is beyond its original length.
    pub fn check_length(&self, length: usize) -> Result<(), Error> {
        match self {
            Self::Dynamic { original } if length > *original => Err(Error::config(
                "rope_scaling.rope_type = dynamic",
                format!("at most {original} positions, since its frequencies change beyond them"),
                length,
            )),
            _ => Ok(()),
        }
    }
}

/// Returns the type of a scaling rule, which has two names.
fn rope_type(value: &Value) -> Result<&str, Error> {
    if let Some((name, rule)) = value.as_object().into_iter().flatten().find(|(_, rule)| rule.is_object()) {
        return Err(Error::config(format!("rope_parameters.{name}"), "one rule for all layers", rule));
    }
    let names = ["rope_type", "type"].map(|name| value.get(name).filter(|kind| !kind.is_null()));
    match names {
        [Some(new), Some(old)] if new != old => {
            Err(Error::config("rope_scaling.type", format!("{new}, the rope_type"), old))
        }
        [new, old] => match new.or(old) {
            None => Ok("default"),
            Some(kind) => kind.as_str().ok_or_else(|| Error::config("rope_scaling.rope_type", "a string", kind)),
        },
    }
}

/// Returns YaRN's factor of cosines and sines: the explicit one, or else the one of its formula.
fn yarn_attention_factor(value: &Value, factor: f64) -> f64 {
    let number = |name: &str| value.get(name).and_then(Value::as_f64);
    let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    number("attention_factor").unwrap_or_else(|| match (number("mscale"), number("mscale_all_dim")) {
        (Some(one), Some(all)) if one != 0.0 && all != 0.0 => mscale(one) / mscale(all),
        _ => mscale(1.0),
    })
}

fn factors(value: &Value, head_dim: usize) -> Result<Vec<f64>, Error> {
    let list = value.get("factors").and_then(Value::as_array);
    let list: Vec<f64> = list.into_iter().flatten().filter_map(Value::as_f64).filter(|&x| x > 0.0).collect();
    if list.len() == head_dim / 2 {
        return Ok(list);
    }
    Err(Error::config("rope_scaling.factors", format!("{} positive numbers", head_dim / 2), list.len()))
}
