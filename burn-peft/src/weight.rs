//! The one type of a matrix that a model multiplies by.

use crate::{
    Error,
    kernel::{self, Compute, LinearKernels, Stored},
    packed::Packed,
    param,
};
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

/// A matrix `[out, in]`: a float parameter, or rows that stay packed. Either way its path is that of the field that holds it.
///
/// Packed rows are frozen. A visitor meets them as a parameter of integers, so nothing that trains, counts or writes float
/// parameters takes them for one.
#[derive(Debug, Clone)]
pub enum Weight<B: Backend> {
    /// In f32, f16 or bf16.
    Dense(Param<Tensor<B, 2>>),
    /// In GGUF's blocks or NF4.
    Packed {
        /// As for any parameter, from the path.
        id: ParamId,
        /// The rows.
        rows: Packed<B>,
    },
}

impl<B: Backend> Weight<B> {
    /// A trainable float parameter at `path`.
    pub fn dense(path: &str, values: Tensor<B, 2>) -> Self {
        Self::Dense(Param::initialized(param::id(path), values.require_grad()))
    }

    /// Packed rows at `path`.
    pub fn packed(path: &str, rows: Packed<B>) -> Self {
        Self::Packed { id: param::id(path), rows }
    }

    /// The same values at another path.
    pub fn at(&self, path: &str) -> Self {
        let id = param::id(path);
        match self {
            Self::Dense(weight) => {
                let (values, trained) = (weight.val(), weight.is_require_grad());
                Self::Dense(Param::initialized(id, values.detach().set_require_grad(trained)))
            }
            Self::Packed { rows, .. } => Self::Packed { id, rows: rows.clone() },
        }
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.lazy_shape().dims(),
            Self::Packed { rows, .. } => rows.shape(),
        }
    }

    /// Where it is.
    pub fn device(&self) -> B::Device {
        match self {
            Self::Dense(weight) => weight.lazy_device(),
            Self::Packed { rows, .. } => rows.device(),
        }
    }

    /// Whether its rows are packed.
    pub fn is_packed(&self) -> bool {
        matches!(self, Self::Packed { .. })
    }

    /// An error if `operation` cannot be done because the rows are packed.
    ///
    /// # Errors
    /// That error.
    pub(crate) fn writable(&self, operation: &'static str) -> Result<(), Error> {
        match self {
            Self::Dense(_) => Ok(()),
            Self::Packed { rows, .. } => Err(Error::Packed { codec: rows.codec(), operation }),
        }
    }

    /// Changes a float parameter; packed rows stay as they are.
    pub(crate) fn map_dense(&mut self, change: impl FnOnce(Tensor<B, 2>) -> Tensor<B, 2>) {
        if let Self::Dense(weight) = self {
            *weight = weight.clone().map(change);
        }
    }
}

impl<B: LinearKernels> Weight<B> {
    /// The values `[out, in]`: the parameter, or what packed rows hold, in f32, for the moment.
    pub fn val(&self) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => weight.val(),
            Self::Packed { rows, .. } => rows.values(),
        }
    }

    /// The values as a float parameter at the same path: f32 where the rows were packed.
    pub fn unpacked(self) -> Self {
        match self {
            Self::Packed { id, rows } => Self::Dense(Param::initialized(id, rows.values())),
            dense => dense,
        }
    }

    /// `x [tokens, in]` → `x·Wᵀ [tokens, out]`, in the type of `x`.
    ///
    /// # Panics
    /// If the inner dimensions differ.
    pub fn linear(&self, x: Tensor<B, 2>, compute: Compute) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => kernel::linear(x, weight.val(), compute),
            Self::Packed { rows, .. } => rows.linear(x, compute),
        }
    }

    /// The matrix for a kernel.
    pub fn stored(&self) -> Stored<B> {
        match self {
            Self::Dense(weight) => Stored::Dense(weight.val().into_primitive().tensor()),
            Self::Packed { rows, .. } => Stored::Packed(rows.clone()),
        }
    }
}

impl<B: Backend> Module<B> for Weight<B> {
    /// Packed rows are not recorded: they are in the model's file.
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
                Self::Packed { id, rows: rows.with(words) }
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
            Self::Packed { id, rows } => Self::Packed { id, rows: rows.with(rows.words().clone().to_device(device)) },
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
            Weight::Packed { id, rows } => Self::Packed { id, rows: Packed::from_inner(rows) },
        }
    }
}

impl<B: AutodiffBackend> HasAutodiffModule<B> for Weight<B::InnerBackend> {
    type TrainModule = Weight<B>;
}
