//! Adapters of a whole model: adding, loading, saving, merging, combining and swapping them.

mod activate;
mod base;
mod combine;
mod convert;
mod embedding;
mod freeze;
mod hotswap;
mod ia3;
mod linears;
mod loftq;
mod lora;
mod merge;
mod not_finite;
mod rank_allocator;
mod registry;
mod save;
mod saved_embeddings;
mod targets;

pub use activate::{activate, delete};
pub use base::is_adapter;
pub use combine::{CombinationType, Weighted, combine, combine_directories};
pub use convert::{convert_mutated_to_lora, save_mutated_as_lora};
pub use embedding::init_tokens_by_mean;
pub use freeze::train_active;
pub use hotswap::hotswap;
pub use ia3::{attach_ia3, load_ia3};
pub use linears::Linears;
pub use loftq::{QuantizationResidual, replace_lora_weights_loftq};
pub use lora::{attach, attach_and_freeze, load};
pub use merge::{merge, safe_merge, unmerge};
pub use not_finite::{find_not_finite, find_trained_not_finite};
pub use rank_allocator::{Orthogonality, RankAllocator};
pub use registry::{active, check_adapter_names, check_new_adapter, names};
pub use save::AdapterModel;
pub use targets::targeted_module_names;
