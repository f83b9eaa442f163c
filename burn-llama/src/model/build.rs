//! Construction of the model from a configuration and a function that reads tensors.

use super::{Attention, Decoder, HeldSegments, Layer, Llama, Mlp, RmsNorm};
use crate::{LlamaConfig, kernel::Kernels};
use burn::{
    module::Param,
    tensor::{Tensor, TensorData},
};
use burn_peft::{Embedding, Linear, Weight, param};
use burn_peft_kernels::{Codec, MatmulPrecision, PackedWeight};
use std::collections::HashMap;

/// Returns the name and shape of every parameter of the model.
pub(crate) fn parameter_shapes(config: &LlamaConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, mlp, dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q, kv) = (config.num_attention_heads * dim, config.num_key_value_heads * dim);
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden])];
    for index in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: &[usize]| all.push((format!("model.layers.{index}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
        if config.qk_norm {
            add("self_attn.q_norm.weight", &[dim]);
            add("self_attn.k_norm.weight", &[dim]);
        }
        let biases = config.biases;
        for (name, out, features, bias) in [
            ("self_attn.q_proj", q, hidden, biases.qkv),
            ("self_attn.k_proj", kv, hidden, biases.qkv),
            ("self_attn.v_proj", kv, hidden, biases.qkv),
            ("self_attn.o_proj", hidden, q, biases.output),
            ("mlp.gate_proj", mlp, hidden, biases.mlp),
            ("mlp.up_proj", mlp, hidden, biases.mlp),
            ("mlp.down_proj", hidden, mlp, biases.mlp),
        ] {
            add(&format!("{name}.weight"), &[out, features]);
            if bias {
                add(&format!("{name}.bias"), &[out]);
            }
        }
    }
    all.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config.tie_word_embeddings {
        all.push(("lm_head.weight".to_owned(), vec![config.vocab_size, hidden]));
    }
    all
}

impl LlamaConfig {
    /// Returns the number of the base model's parameters that each segment uses.
    pub fn segment_parameters(&self) -> Vec<usize> {
        let mut counts = vec![0; self.num_segments()];
        for (name, shape) in parameter_shapes(self) {
            let elements = shape.iter().product::<usize>();
            self.segments_of(&name).into_iter().for_each(|segment| counts[segment] += elements);
        }
        counts
    }
}

/// The content of a tensor as read from a checkpoint.
pub(crate) enum LoadedTensor {
    /// Float values.
    Floats(TensorData),
    /// Packed rows, back to back.
    PackedRows {
        /// The format of the packed rows.
        codec: Codec,
        /// The number of values in a row.
        features: usize,
        /// The packed bytes of all rows.
        bytes: Vec<u8>,
    },
}

/// A function that reads a tensor by name.
type TensorReader<'a, E> = &'a dyn Fn(&str) -> Result<LoadedTensor, E>;

/// Builds the model on `device`, reading each tensor once with `read`, which returns placeholders (one element, or one
/// packed row) for the tensors that are not `held`.
pub(crate) fn build<B: Kernels, E>(
    config: &LlamaConfig,
    held: &HeldSegments,
    read: TensorReader<'_, E>,
    device: &B::Device,
) -> Result<Llama<B>, E> {
    let shapes = parameter_shapes(config).into_iter().collect();
    let build = ModelBuilder { config, held, shapes, read, device };
    let layers = (0..config.num_hidden_layers).map(|index| build.layer(index)).collect::<Result<_, _>>()?;
    Ok(Llama {
        model: Decoder {
            embed_tokens: build.embedding("model.embed_tokens")?,
            layers,
            norm: build.norm("model.norm")?,
        },
        prompts: Vec::new(),
        lm_head: if config.tie_word_embeddings { None } else { Some(build.linear("lm_head", false)?) },
        config: config.clone(),
        matmul_precision: MatmulPrecision::F32,
        held: held.clone(),
    })
}

/// The inputs that every module of the model is built from.
struct ModelBuilder<'a, D, E> {
    config: &'a LlamaConfig,
    held: &'a HeldSegments,
    shapes: HashMap<String, Vec<usize>>,
    read: TensorReader<'a, E>,
    device: &'a D,
}

impl<D, E> ModelBuilder<'_, D, E> {
    fn tensor<B: Kernels<Device = D>, const N: usize>(&self, name: &str) -> Result<Tensor<B, N>, E> {
        let data = match (self.read)(name)? {
            LoadedTensor::Floats(data) => data,
            LoadedTensor::PackedRows { codec, .. } => panic!("{name}: expected a vector of floats, found {codec}"),
        };
        let dtype = data.dtype;
        Ok(Tensor::from_data(data, (self.device, dtype)))
    }

    fn norm<B: Kernels<Device = D>>(&self, path: &str) -> Result<RmsNorm<B>, E> {
        let name = format!("{path}.weight");
        let weight = self.tensor::<B, 1>(&name)?.require_grad();
        Ok(RmsNorm { weight: Param::initialized(param::id(&name), weight), epsilon: self.config.rms_norm_eps })
    }

    fn linear<B: Kernels<Device = D>>(&self, path: &str, bias: bool) -> Result<Linear<B>, E> {
        let bias = if bias { Some(self.tensor(&format!("{path}.bias"))?) } else { None };
        let name = format!("{path}.weight");
        let linear = Linear::from_weight(path, self.weight(&name)?, bias);
        Ok(match self.shape_elsewhere(&name) {
            Some(shape) => linear.into_placeholder(shape),
            None => linear,
        })
    }

    fn embedding<B: Kernels<Device = D>>(&self, path: &str) -> Result<Embedding<B>, E> {
        let name = format!("{path}.weight");
        let embedding = Embedding::new(self.weight(&name)?);
        Ok(match self.shape_elsewhere(&name) {
            Some(shape) => embedding.into_placeholder(shape),
            None => embedding,
        })
    }

    /// Returns the shape of a matrix if another rank holds it.
    fn shape_elsewhere(&self, name: &str) -> Option<[usize; 2]> {
        if self.held.holds(self.config, name) {
            return None;
        }
        self.shapes.get(name)?.as_slice().try_into().ok()
    }

    fn weight<B: Kernels<Device = D>>(&self, name: &str) -> Result<Weight<B>, E> {
        Ok(match (self.read)(name)? {
            LoadedTensor::Floats(data) => {
                let dtype = data.dtype;
                Weight::dense(name, Tensor::from_data(data, (self.device, dtype)))
            }
            LoadedTensor::PackedRows { codec, features, bytes } => {
                let rows = bytes.chunks_exact(codec.row_bytes(features).max(1));
                Weight::packed(name, PackedWeight::new(codec, features, rows, self.device))
            }
        })
    }

    fn layer<B: Kernels<Device = D>>(&self, index: usize) -> Result<Layer<B>, E> {
        let (path, biases) = (format!("model.layers.{index}"), self.config.biases);
        let linear = |name: &str, bias| self.linear(&format!("{path}.{name}"), bias);
        let norm = |name: &str| self.norm(&format!("{path}.{name}"));
        let head_norm = |name: &str| if self.config.qk_norm { norm(name).map(Some) } else { Ok(None) };
        Ok(Layer {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention {
                q_proj: linear("self_attn.q_proj", biases.qkv)?,
                k_proj: linear("self_attn.k_proj", biases.qkv)?,
                v_proj: linear("self_attn.v_proj", biases.qkv)?,
                o_proj: linear("self_attn.o_proj", biases.output)?,
                q_norm: head_norm("self_attn.q_norm")?,
                k_norm: head_norm("self_attn.k_norm")?,
                head_dim: self.config.head_dim,
            },
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp {
                gate_proj: linear("mlp.gate_proj", biases.mlp)?,
                up_proj: linear("mlp.up_proj", biases.mlp)?,
                down_proj: linear("mlp.down_proj", biases.mlp)?,
            },
        })
    }
}
