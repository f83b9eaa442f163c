//! LoftQ initialization (Li et al., 2023, arXiv:2310.08659): the adapter starts as the best low-rank approximation of
//! the quantization error.

use super::linears::Linears;
use crate::{
    Error, Weight,
    lora::{Dora, Factors, low_rank_decomposition, weight_norm},
    random,
};
use burn::tensor::{DType, Tensor, TensorData};
use burn_peft_kernels::{Codec, LinearKernels, PackedWeight};
use std::{
    collections::BTreeMap,
    panic::resume_unwind,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// The number of subspace iterations. The quantization error is nearly noise, the slowest case: for a 1536 × 576 matrix
/// of independent normal numbers, this many leave 1.0001 times (rank 8) to 1.0003 times (rank 16) the error of the
/// exact SVD.
const NITER: usize = 12;

/// The most layers computed in parallel, if there are enough processors: each holds a few copies of its matrix in f32.
const MAX_PARALLEL_LAYERS: usize = 4;

/// The quantization error of the weights, without and with the adapters, as sums of squares over all layers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct QuantizationResidual {
    /// The number of layers.
    pub layers: usize,
    /// `Σ ‖W - nf4(W)‖²`.
    pub without_adapter: f64,
    /// `Σ ‖W - nf4(W) - s·B·A‖²`.
    pub with_adapter: f64,
}

/// A layer whose weight is in NF4.
struct Nf4Layer<B: LinearKernels> {
    path: String,
    rows: PackedWeight<B>,
    r: usize,
    scaling: f64,
}

/// The initial `A` and `B` of one layer, and its quantization error without and with them.
struct LoftqInit<B: LinearKernels> {
    a: Tensor<B, 2>,
    b: Tensor<B, 2>,
    without_adapter: f64,
    with_adapter: f64,
}

/// Reinitializes the new adapter `name` on every layer whose weight is in NF4: `s·B·A` becomes the best approximation
/// of `W - nf4(W)` by the adapter's rank, so that the model starts closer to the unquantized one. Other layers stay as
/// they are. The base weights do not change: this is LoftQ with one iteration (with more, the base is no longer
/// `nf4(W)`), like PEFT's function of the same name, and the adapter fits every NF4 copy of the model. PEFT's function
/// does not divide by `s`, which is right only if `s` is 1.
///
/// `original` returns `W [out, in]` in any float type for a layer's path. It is called once per layer, from several
/// threads; at most four of these matrices are held at a time.
///
/// # Errors
/// Errors of `original`; or if no layer in NF4 has the adapter, or an original weight has another shape.
pub fn replace_lora_weights_loftq<B, M, E>(
    model: &mut M,
    name: &str,
    original: &(dyn Fn(&str) -> Result<TensorData, E> + Sync),
) -> Result<QuantizationResidual, E>
where
    B: LinearKernels,
    M: Linears<B>,
    E: From<Error> + Send,
{
    let layers = nf4_layers(model, name);
    if layers.is_empty() {
        let state = "is on no weight in NF4; LoftQ initializes from the error of quantizing to NF4";
        return Err(Error::adapter(name, state).into());
    }
    let start = |layer: &Nf4Layer<B>| Ok::<_, E>(layer.compute_init(original(&layer.path)?)?);
    let mut starts = parallel_map(&layers, start)?;
    let mut sum = QuantizationResidual { layers: layers.len(), ..QuantizationResidual::default() };
    model.linears_mut(&mut |path, linear| {
        let Some(LoftqInit { a, b, without_adapter, with_adapter }) = starts.remove(path) else { return };
        let weight = linear.weight.matrix_ref();
        for adapter in linear.adapters.iter_mut().filter(|adapter| adapter.name == name) {
            adapter.set_weights(a.clone(), b.clone());
            if adapter.dora.is_some() {
                adapter.dora = Some(Dora::new(path, name, weight_norm(adapter, &weight)));
            }
        }
        sum.without_adapter += without_adapter;
        sum.with_adapter += with_adapter;
    });
    Ok(sum)
}

/// Returns the layers in NF4 that have the adapter.
fn nf4_layers<B: LinearKernels, M: Linears<B>>(model: &M, name: &str) -> Vec<Nf4Layer<B>> {
    let mut layers = Vec::new();
    model.linears(&mut |path, linear| {
        if let (Some(adapter), Weight::Packed { rows, .. }) = (linear.adapter(name), &linear.weight)
            && rows.codec() == Codec::Nf4
        {
            let (r, scaling) = (adapter.lora_a.lazy_shape()[0], adapter.scaling);
            layers.push(Nf4Layer { path: path.to_owned(), rows: rows.clone(), r, scaling });
        }
    });
    layers
}

impl<B: LinearKernels> Nf4Layer<B> {
    /// Computes the initial values from the original weight; `None` if quantization was exact: an adapter of zeros
    /// would never learn.
    fn compute_init(&self, original: TensorData) -> Result<Option<(String, LoftqInit<B>)>, Error> {
        let (expected, found) = (self.rows.shape(), original.shape.to_vec());
        if found != expected {
            let message =
                format!("the unquantized weight of {}: expected the shape {expected:?}, found {found:?}", self.path);
            return Err(Error::config(message));
        }
        let original = Tensor::<B, 2>::from_data(original, (&self.rows.device(), DType::F32));
        let residual = original - self.rows.values();
        let taken = sum_of_squares(&residual);
        if taken == 0.0 {
            return Ok(None);
        }
        let Factors { a, b } =
            low_rank_decomposition(residual.clone(), self.r, Some(NITER), random::key_from_str(&self.path));
        let left = sum_of_squares(&(residual - b.clone().matmul(a.clone())));
        let share = self.scaling.sqrt();
        Ok(Some((
            self.path.clone(),
            LoftqInit { a: a / share, b: b / share, without_adapter: taken, with_adapter: left },
        )))
    }
}

/// Returns the sum of squares; each row is summed in f32.
fn sum_of_squares<B: LinearKernels>(x: &Tensor<B, 2>) -> f64 {
    x.clone().powi_scalar(2).sum_dim(1).into_data().iter::<f64>().sum()
}

/// Runs `work` on all items in parallel and returns its results by path; stops at the first error.
fn parallel_map<T: Sync, R: Send, E: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<Option<(String, R)>, E> + Sync,
) -> Result<BTreeMap<String, R>, E> {
    let (next, found) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let worker = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            let one = work(item).inspect_err(|_| next.store(items.len(), Ordering::Relaxed))?;
            found.lock().unwrap_or_else(PoisonError::into_inner).extend(one);
        }
        Ok(())
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_PARALLEL_LAYERS);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
}
