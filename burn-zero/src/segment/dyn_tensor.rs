//! Float tensors whose rank is known only at run time.

use burn::tensor::{
    DType, FloatDType, Shape, Tensor, TensorMetadata, TensorPrimitive,
    backend::{AutodiffBackend, Backend},
    ops::FloatTensor,
};

/// A float tensor whose rank is known only at run time; segments exchange such tensors.
#[derive(Clone, Debug)]
pub struct DynTensor<B: Backend>(pub(super) FloatTensor<B>);

impl<B: Backend> DynTensor<B> {
    /// Wraps a tensor of any rank.
    pub fn new<const D: usize>(tensor: Tensor<B, D>) -> Self {
        Self(tensor.into_primitive().tensor())
    }

    /// Returns the tensor with rank `D`.
    ///
    /// # Panics
    /// Panics if the tensor has another rank.
    pub fn tensor<const D: usize>(self) -> Tensor<B, D> {
        let shape = self.0.shape();
        assert_eq!(shape.num_dims(), D, "a tensor of shape {shape:?} does not have rank {D}");
        Tensor::from_primitive(TensorPrimitive::Float(self.0))
    }

    /// Returns the backend's tensor.
    pub fn primitive(self) -> FloatTensor<B> {
        self.0
    }

    /// Wraps the backend's tensor.
    pub fn from_primitive(primitive: FloatTensor<B>) -> Self {
        Self(primitive)
    }

    /// Returns the elements in row-major order, `[elements]`.
    pub fn flatten(self) -> Tensor<B, 1> {
        let elements = self.0.shape().num_elements();
        Self(B::float_reshape(self.0, Shape::new([elements]))).tensor()
    }

    /// Adds a tensor of the same shape.
    pub(crate) fn add(self, other: Self) -> Self {
        Self(B::float_add(self.0, other.0))
    }

    /// Returns the same elements in another shape.
    pub(crate) fn reshape(self, dims: &[usize]) -> Self {
        Self(B::float_reshape(self.0, Shape::from(dims.to_vec())))
    }

    /// Returns the size of every dimension.
    pub(crate) fn dims(&self) -> Vec<usize> {
        self.0.shape().to_vec()
    }

    /// Returns the number of elements.
    pub(crate) fn elements(&self) -> usize {
        self.0.shape().num_elements()
    }

    /// Returns the dtype of the elements.
    pub(crate) fn dtype(&self) -> DType {
        self.0.dtype()
    }

    /// Returns the bytes of the elements.
    pub(crate) fn bytes(&self) -> usize {
        self.elements() * self.0.dtype().size()
    }

    /// Converts to f32; a tensor in f32 is returned unchanged.
    pub(crate) fn into_f32(self) -> Self {
        self.into_dtype(DType::F32)
    }

    /// Converts to another dtype; a tensor that has the dtype already is returned unchanged.
    pub(crate) fn into_dtype(self, dtype: DType) -> Self {
        if self.0.dtype() == dtype { self } else { Self(B::float_cast(self.0, FloatDType::from(dtype))) }
    }
}

impl<B: AutodiffBackend> DynTensor<B> {
    /// Returns the tensor without its graph.
    pub(super) fn inner(self) -> DynTensor<B::InnerBackend> {
        DynTensor(B::inner(self.0))
    }

    /// Creates a leaf of a new graph.
    pub(super) fn leaf(inner: DynTensor<B::InnerBackend>, require_grad: bool) -> Self {
        Self(B::float_set_require_grad(B::from_inner(inner.0), require_grad))
    }
}
