//! The weight matrix of a linear layer or an embedding, dense or packed.

use crate::{Error, param};
use burn::{
    module::{
        AutodiffModule, Content, HasAutodiffModule, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
        ModuleVisitor, Param, ParamId,
    },
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_peft_kernels::{LinearKernels, MatmulPrecision, PackedWeight, WeightMatrix, linear_param};

/// A matrix `[out, in]`: a float parameter, or packed (quantized) rows. In both cases its path in the module tree is
/// that of the field that holds it.
///
/// Packed rows are frozen. Module visitors get them as an integer parameter, so code that trains, counts or saves float
/// parameters skips them.
#[derive(Debug, Clone)]
pub enum Weight<B: Backend> {
    /// A float parameter in f32, f16 or bf16.
    Dense(Param<Tensor<B, 2>>),
    /// Rows packed in GGUF's block formats or NF4.
    Packed {
        /// The parameter id, derived from the path as for any parameter.
        id: ParamId,
        /// The packed rows.
        rows: PackedWeight<B>,
    },
}

impl<B: Backend> Weight<B> {
    /// Creates a trainable float parameter at `path`.
    pub fn dense(path: &str, values: Tensor<B, 2>) -> Self {
        Self::Dense(Param::initialized(param::id(path), values.require_grad()))
    }

    /// Creates a packed weight at `path`.
    pub fn packed(path: &str, rows: PackedWeight<B>) -> Self {
        Self::Packed { id: param::id(path), rows }
    }

    /// Returns a weight with the same values at another path.
    pub fn with_path(&self, path: &str) -> Self {
        let id = param::id(path);
        match self {
            Self::Dense(weight) => {
                let (values, trained) = (weight.val(), weight.is_require_grad());
                Self::Dense(Param::initialized(id, values.detach().set_require_grad(trained)))
            }
            Self::Packed { rows, .. } => Self::Packed { id, rows: rows.clone() },
        }
    }

    /// Replaces the values by a placeholder of one element, or of one row if they are packed: another rank holds them.
    /// Id, format and trainability stay.
    pub fn into_placeholder(self) -> Self {
        match self {
            Self::Dense(weight) => Self::Dense(param::placeholder(weight)),
            Self::Packed { id, rows } => {
                let [_, words] = rows.words().dims();
                let row = Tensor::zeros([1, words], (&rows.device(), rows.words().dtype()));
                Self::Packed { id, rows: rows.with_words(row) }
            }
        }
    }

    /// Returns the shape `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.lazy_shape().dims(),
            Self::Packed { rows, .. } => rows.shape(),
        }
    }

    /// Returns the device of the weight.
    pub fn device(&self) -> B::Device {
        match self {
            Self::Dense(weight) => weight.lazy_device(),
            Self::Packed { rows, .. } => rows.device(),
        }
    }

    /// Returns true if the weight is packed.
    pub fn is_packed(&self) -> bool {
        matches!(self, Self::Packed { .. })
    }

    /// Checks that `operation` can change the weight.
    ///
    /// # Errors
    /// If the weight is packed.
    pub(crate) fn check_writable(&self, operation: &'static str) -> Result<(), Error> {
        match self {
            Self::Dense(_) => Ok(()),
            Self::Packed { rows, .. } => Err(Error::Packed { codec: rows.codec(), operation }),
        }
    }

    /// Replaces the values of a float parameter by those that `change` returns; packed rows stay as they are.
    pub(crate) fn map_dense(&mut self, change: impl FnOnce(Tensor<B, 2>) -> Tensor<B, 2>) {
        if let Self::Dense(weight) = self {
            *weight = weight.clone().map(change);
        }
    }
}

impl<B: LinearKernels> Weight<B> {
    /// Returns the values `[out, in]`: the parameter itself, or the packed rows dequantized to f32.
    pub fn val(&self) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => weight.val(),
            Self::Packed { rows, .. } => rows.values(),
        }
    }

    /// Converts packed rows to a float parameter in f32 at the same path; a dense weight stays as it is.
    pub fn unpacked(self) -> Self {
        match self {
            Self::Packed { id, rows } => Self::Dense(Param::initialized(id, rows.values())),
            dense => dense,
        }
    }

    /// Computes `x·Wᵀ`: `x [tokens, in]` → `[tokens, out]`, in the type of `x`.
    ///
    /// # Panics
    /// If the inner dimensions differ.
    pub fn linear(&self, x: Tensor<B, 2>, compute: MatmulPrecision) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => linear_param(x, weight, compute),
            Self::Packed { rows, .. } => rows.linear(x, compute),
        }
    }

    /// Returns the matrix in the form that kernels take.
    pub fn matrix_ref(&self) -> WeightMatrix<B> {
        match self {
            Self::Dense(weight) => WeightMatrix::Dense(weight.val().into_primitive().tensor()),
            Self::Packed { rows, .. } => WeightMatrix::Packed(rows.clone()),
        }
    }
}

impl<B: Backend> Module<B> for Weight<B> {
    /// Packed rows are not recorded, because the model's file contains them.
    type Record = Option<Param<Tensor<B, 2>>>;

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        match self {
            Self::Dense(weight) => weight.visit(visitor),
            Self::Packed { id, rows } => Param::initialized(*id, rows.words().clone()).visit(visitor),
        }
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        match self {
            Self::Dense(weight) => Self::Dense(Module::<B>::map(weight, mapper)),
            Self::Packed { id, rows } => {
                let words = Module::<B>::map(Param::initialized(id, rows.words().clone()), mapper).val();
                Self::Packed { id, rows: rows.with_words(words) }
            }
        }
    }

    fn into_record(self) -> Self::Record {
        match self {
            Self::Dense(weight) => Some(weight.into_record()),
            Self::Packed { .. } => None,
        }
    }

    fn load_record(self, record: Self::Record) -> Self {
        match (self, record) {
            (Self::Dense(weight), Some(record)) => Self::Dense(weight.load_record(record)),
            (weight, _) => weight,
        }
    }

    fn to_device(self, device: &B::Device) -> Self {
        match self {
            Self::Dense(weight) => Self::Dense(weight.to_device(device)),
            Self::Packed { id, rows } => {
                Self::Packed { id, rows: rows.with_words(rows.words().clone().to_device(device)) }
            }
        }
    }

    fn fork(self, device: &B::Device) -> Self {
        match self {
            Self::Dense(weight) => Self::Dense(weight.fork(device)),
            packed => packed.to_device(device),
        }
    }

    fn collect_devices(&self, mut devices: Vec<B::Device>) -> Vec<B::Device> {
        if !devices.contains(&self.device()) {
            devices.push(self.device());
        }
        devices
    }
}

impl<B: Backend> ModuleDisplayDefault for Weight<B> {
    fn content(&self, content: Content) -> Option<Content> {
        match self {
            Self::Dense(weight) => weight.content(content),
            Self::Packed { rows, .. } => {
                let text = format!("Packed {{shape: {:?}, codec: {}}}", rows.shape(), rows.codec());
                content.add_formatted(&text).optional()
            }
        }
    }
}

impl<B: Backend> ModuleDisplay for Weight<B> {}

impl<B: AutodiffBackend> AutodiffModule<B> for Weight<B> {
    type InnerModule = Weight<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        match self {
            Self::Dense(weight) => Weight::Dense(weight.valid()),
            Self::Packed { id, rows } => Weight::Packed { id: *id, rows: rows.inner() },
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        match module {
            Weight::Dense(weight) => Self::Dense(Param::from_inner(weight)),
            Weight::Packed { id, rows } => Self::Packed { id, rows: PackedWeight::from_inner(rows) },
        }
    }
}

impl<B: AutodiffBackend> HasAutodiffModule<B> for Weight<B::InnerBackend> {
    type TrainModule = Weight<B>;
}
