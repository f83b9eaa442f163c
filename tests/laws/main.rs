//! Laws that span the crates, on small models: agreement with transformers and PEFT, and equalities such as merged ≡
//! unmerged, packed ≡ separate, cached ≡ recomputed. One binary, so that the model is compiled once for all of them.

mod adalora;
mod export;
mod family;
mod generate;
mod gguf;
mod hub;
mod loftq;
mod methods;
mod packed;
mod pipeline;
mod pre_tokenizers;
mod prompt;
mod several;
mod templates;
mod text;
mod train;
mod transformers;
