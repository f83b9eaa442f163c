//! LoftQ's start (Li et al., 2023, arXiv:2310.08659): an adapter that gives back the most of what rounding took.

use super::Linears;
use crate::{
    Error, Weight,
    kernel::LinearKernels,
    lora::{Dora, halves, norm},
    packed::{Codec, Packed},
    random,
};
use burn::tensor::{DType, Tensor, TensorData};
use std::{
    collections::BTreeMap,
    panic::resume_unwind,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// Subspace iterations. What rounding takes is nearly noise, the slowest case: of independent normal numbers, 1536 × 576, they leave
/// 1.0001 times (rank 8) to 1.0003 times (rank 16) what the singular vectors would.
const NITER: usize = 12;

/// Layers that are computed side by side, where there are processors: each holds a few times its matrix in f32.
const SIDE_BY_SIDE: usize = 4;

/// What rounding took from the weights of layers, and what it still takes with their adapters, as sums of squares.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rounding {
    /// The layers.
    pub layers: usize,
    /// `Σ ‖W - nf4(W)‖²`.
    pub taken: f64,
    /// `Σ ‖W - nf4(W) - s·B·A‖²`.
    pub left: f64,
}

/// A layer whose weight is NF4.
struct Layer<B: LinearKernels> {
    path: String,
    rows: Packed<B>,
    r: usize,
    scaling: f64,
}

/// `A` and `B`, and the sums of squares.
struct Start<B: LinearKernels> {
    a: Tensor<B, 2>,
    b: Tensor<B, 2>,
    taken: f64,
    left: f64,
}

/// Starts the new adapter `name` anew, wherever it is on a weight in NF4: `s·B·A` becomes the best approximation of its rank of `W -
/// nf4(W)`, so that the model begins nearer to the one that was not rounded. Elsewhere it stays as it is. The base is not
/// changed: this is LoftQ of one iteration (with more, the base is no longer `nf4(W)`), PEFT's function of the same name, and its
/// adapter is one of every NF4 copy of the model. PEFT's does not divide by `s`, which is right only where that is 1.
///
/// `original` gives `W [out, in]` in any float type, by the layer's path, and is asked once for each, by several threads; no more
/// than four of them are held at a time.
///
/// # Errors
/// Those of `original`; or if no layer in NF4 has the adapter, or an original has another shape.
pub fn replace_lora_weights_loftq<B, M, E>(
    model: &mut M,
    name: &str,
    original: &(dyn Fn(&str) -> Result<TensorData, E> + Sync),
) -> Result<Rounding, E>
where
    B: LinearKernels,
    M: Linears<B>,
    E: From<Error> + Send,
{
    let layers = rounded(model, name);
    if layers.is_empty() {
        let state = "is on no weight in NF4; LoftQ starts from what rounding to NF4 took";
        return Err(Error::Name { name: name.to_owned(), state }.into());
    }
    let start = |layer: &Layer<B>| Ok::<_, E>(layer.start(original(&layer.path)?)?);
    let mut starts = side_by_side(&layers, start)?;
    let mut sum = Rounding { layers: layers.len(), ..Rounding::default() };
    model.linears_mut(&mut |path, linear| {
        let Some(Start { a, b, taken, left }) = starts.remove(path) else { return };
        let weight = linear.weight.stored();
        for adapter in linear.adapters.iter_mut().filter(|adapter| adapter.name == name) {
            adapter.replace(a.clone(), b.clone());
            if adapter.dora.is_some() {
                adapter.dora = Some(Dora::new(path, name, norm(adapter, &weight)));
            }
        }
        (sum.taken, sum.left) = (sum.taken + taken, sum.left + left);
    });
    Ok(sum)
}

/// The layers in NF4 that have the adapter.
fn rounded<B: LinearKernels, M: Linears<B>>(model: &M, name: &str) -> Vec<Layer<B>> {
    let mut layers = Vec::new();
    model.linears(&mut |path, linear| {
        if let (Some(adapter), Weight::Packed { rows, .. }) = (linear.adapter(name), &linear.weight)
            && rows.codec() == Codec::Nf4
        {
            let (r, scaling) = (adapter.lora_a.lazy_shape()[0], adapter.scaling);
            layers.push(Layer { path: path.to_owned(), rows: rows.clone(), r, scaling });
        }
    });
    layers
}

impl<B: LinearKernels> Layer<B> {
    /// The start for the weight as it was; `None` where rounding took nothing: an adapter of zeros would never learn.
    fn start(&self, original: TensorData) -> Result<Option<(String, Start<B>)>, Error> {
        let (expected, found) = (self.rows.shape(), original.shape.to_vec());
        if found != expected {
            let message =
                format!("the unrounded weight of {}: expected the shape {expected:?}, found {found:?}", self.path);
            return Err(Error::config(message));
        }
        let original = Tensor::<B, 2>::from_data(original, (&self.rows.device(), DType::F32));
        let lost = original - self.rows.values();
        let taken = squares(&lost);
        if taken == 0.0 {
            return Ok(None);
        }
        let (a, b) = halves(lost.clone(), self.r, Some(NITER), random::text(&self.path));
        let left = squares(&(lost - b.clone().matmul(a.clone())));
        let share = self.scaling.sqrt();
        Ok(Some((self.path.clone(), Start { a: a / share, b: b / share, taken, left })))
    }
}

/// The sum of squares, row by row in f32.
fn squares<B: LinearKernels>(x: &Tensor<B, 2>) -> f64 {
    x.clone().powi_scalar(2).sum_dim(1).into_data().iter::<f64>().sum()
}

/// What `work` finds, by path; the first error ends it.
fn side_by_side<T: Sync, R: Send, E: Send>(
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
    let threads = thread::available_parallelism().map_or(1, usize::from).min(SIDE_BY_SIDE);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
}
