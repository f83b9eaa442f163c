//! AdaLoRA (Zhang et al., 2023, arXiv:2303.10512): LoRA with a trained factor per rank, `s·B·diag(E)·A`.

use super::{names, tensor_key};
use crate::{Error, LoraConfig};
use burn::tensor::TensorData;
use serde_json::json;
use std::{collections::BTreeMap, path::Path};

/// PEFT's names of the factor and the two matrices.
const PARTS: [&str; 3] = ["lora_E", "lora_A", "lora_B"];

/// Makes plain LoRA of an AdaLoRA adapter whose `config.r` is its initial rank: the factors `E` are multiplied into
/// `A`, and ranks and scalings that training left on single layers become patterns. PEFT scales by
/// `lora_alpha / (r + 1e-5)` with the initial rank `r`, whatever rank a layer has left.
pub(super) fn fold(
    directory: &Path,
    config: &mut LoraConfig,
    mut tensors: BTreeMap<String, TensorData>,
) -> Result<BTreeMap<String, TensorData>, Error> {
    let (r, alpha) = (config.r, config.lora_alpha);
    let scaling = |rank: usize| if alpha > 0.0 { alpha } else { rank as f64 } / (r as f64 + 1e-5);
    config.lora_alpha = scaling(r) * r as f64;
    let is_part = |key: &String| PARTS.iter().any(|part| key.ends_with(&format!(".{part}")));
    let paths: Vec<String> = tensors.keys().filter(|key| is_part(key)).filter_map(|key| layer_path(key)).collect();
    for path in paths {
        let parts = PARTS.map(|part| tensors.remove(&format!("{}{path}.{part}", names::PREFIX)));
        let [Some(e), Some(a), Some(b)] = parts else { continue };
        let Some(pair) = Pair::new(&e, &a, &b) else {
            let message =
                format!("{path}: expected E [r, 1], A [r, in] and B [out, r], found {:?}", [e, a, b].map(|x| x.shape));
            return Err(Error::Mismatch { path: directory.to_owned(), message });
        };
        if pair.rank != r {
            let key = path.replace('.', r"\.");
            config.rank_pattern.insert(key.clone(), json!(pair.rank));
            config.alpha_pattern.insert(key, json!(scaling(pair.rank) * pair.rank as f64));
        }
        tensors.insert(tensor_key(&path, "lora_A"), pair.a);
        tensors.insert(tensor_key(&path, "lora_B"), pair.b);
    }
    Ok(tensors)
}

fn layer_path(key: &str) -> Option<String> {
    Some(key.strip_prefix(names::PREFIX)?.strip_suffix(".lora_E")?.to_owned())
}

/// The matrices of plain LoRA.
struct Pair {
    rank: usize,
    a: TensorData,
    b: TensorData,
}

impl Pair {
    /// Multiplies `e` into `a`. A layer without any rank left gets a rank of zeros. Returns `None` if the shapes do not
    /// fit.
    fn new(e: &TensorData, a: &TensorData, b: &TensorData) -> Option<Self> {
        let (&[rank, 1], &[rows, features], &[out, columns]) =
            (e.shape.as_slice(), a.shape.as_slice(), b.shape.as_slice())
        else {
            return None;
        };
        if rank != rows || rank != columns {
            return None;
        }
        if rank == 0 {
            let zeros = |shape: [usize; 2]| TensorData::zeros::<f32, _>(shape);
            return Some(Self { rank: 1, a: zeros([1, features]), b: zeros([out, 1]) });
        }
        let factors: Vec<f32> = e.iter().collect();
        let values = a.iter::<f32>().enumerate().map(|(at, value)| value * factors[at / features.max(1)]);
        Some(Self { rank, a: TensorData::new(values.collect::<Vec<f32>>(), [rank, features]), b: b.clone() })
    }
}
