use super::*;
use burn::{
    backend::{Autodiff, Flex},
    module::{ModuleMapper, Param},
    tensor::{DType, Distribution, Int, Tensor, activation::log_softmax},
};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) type TestBackend = Autodiff<Flex>;

const VOCAB: usize = 11;
const HIDDEN: usize = 6;

/// Returns a lock that every test with a backward pass must hold, because concurrent backward passes of one process
/// disturb each other in Burn 0.21.
pub(crate) fn backward_lock() -> MutexGuard<'static, ()> {
    static BACKWARD: Mutex<()> = Mutex::new(());
    BACKWARD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A model of a tied embedding and two linear layers around a skip connection. The second segment returns two tensors
/// that both have a gradient; the third also returns a constant without graph and an unused hidden state.
#[derive(Module, Debug)]
pub(crate) struct Toy<B: Backend> {
    pub embed: Param<Tensor<B, 2>>,
    pub up: Param<Tensor<B, 2>>,
    pub up_bias: Param<Tensor<B, 1>>,
    pub down: Param<Tensor<B, 2>>,
    pub norm: Param<Tensor<B, 1>>,
    /// The output matrix; none if it is tied to the embedding.
    pub head: Option<Param<Tensor<B, 2>>>,
}

#[derive(Clone, Debug)]
pub(crate) struct ToyBatch<B: Backend> {
    ids: Tensor<B, 1, Int>,
    targets: Tensor<B, 1, Int>,
    weights: Tensor<B, 1>,
}

impl ToyBatch<TestBackend> {
    /// Creates a batch from tokens `from..to` of a fixed stream; every third token has weight 0, the others have `1 /
    /// total`.
    pub(crate) fn new(from: i32, to: i32, total: f32) -> Self {
        let device = Default::default();
        let ids: Vec<i32> = (from..to).map(|i| (i * i + 3 * i) % VOCAB as i32).collect();
        let targets: Vec<i32> = (from..to).map(|i| (i * i + i + 1) % VOCAB as i32).collect();
        let weights: Vec<f32> = (from..to).map(|i| if i % 3 == 0 { 0.0 } else { 1.0 / total }).collect();
        Self {
            ids: Tensor::from_ints(ids.as_slice(), &device),
            targets: Tensor::from_ints(targets.as_slice(), &device),
            weights: Tensor::from_floats(weights.as_slice(), &device),
        }
    }
}

pub(crate) fn toy() -> Toy<TestBackend> {
    toy_of(VOCAB, HIDDEN, true)
}

pub(crate) fn toy_of(vocab: usize, hidden: usize, tied: bool) -> Toy<TestBackend> {
    let device = Default::default();
    TestBackend::seed(&device, 7);
    let normal = Distribution::Normal(0.0, 0.5);
    Toy {
        embed: Param::from_tensor(Tensor::random([vocab, hidden], normal, &device)),
        up: Param::from_tensor(Tensor::random([hidden, hidden], normal, &device)),
        up_bias: Param::from_tensor(Tensor::random([hidden], normal, &device)),
        down: Param::from_tensor(Tensor::random([hidden, hidden], normal, &device)),
        norm: Param::from_tensor(Tensor::random([hidden], normal, &device)),
        head: (!tied).then(|| Param::from_tensor(Tensor::random([vocab, hidden], normal, &device))),
    }
}

impl<B: Backend> Segments<B> for Toy<B> {
    type Batch = ToyBatch<B>;

    fn segments(&self) -> usize {
        4
    }

    fn forward_segment(&self, segment: usize, batch: &ToyBatch<B>, inputs: Vec<DynTensor<B>>) -> Vec<DynTensor<B>> {
        let mut inputs = inputs.into_iter();
        let mut next = || inputs.next().unwrap();
        match segment {
            0 => vec![DynTensor::new(self.embed.val().select(0, batch.ids.clone()))],
            1 => {
                let x = next().tensor::<2>();
                let h = x.clone().matmul(self.up.val()) + self.up_bias.val().unsqueeze();
                vec![DynTensor::new(h.tanh()), DynTensor::new(x)]
            }
            2 => {
                let (h, x) = (next().tensor::<2>(), next().tensor::<2>());
                // The weight may have any dtype.
                let y = h.clone().matmul(self.down.val().cast(DType::F32)) + x;
                vec![
                    DynTensor::new(y),
                    DynTensor::new(Tensor::<B, 1>::ones([1], &h.device()) * 0.5),
                    DynTensor::new(h.unsqueeze::<3>()),
                ]
            }
            _ => {
                let (y, scale) = (next().tensor::<2>(), next().tensor::<1>());
                let y = y * self.norm.val().unsqueeze() * scale.unsqueeze();
                let head = self.head.as_ref().unwrap_or(&self.embed).val();
                let logits = log_softmax(y.matmul(head.transpose()), 1);
                let log_likelihood = logits.gather(1, batch.targets.clone().unsqueeze_dim(1)).squeeze_dim::<1>(1);
                vec![DynTensor::new(log_likelihood.neg() * batch.weights.clone())]
            }
        }
    }
}

impl<B: AutodiffBackend> TrainSegments<B> for Toy<B> {
    fn inner_batch(batch: &ToyBatch<B>) -> ToyBatch<B::InnerBackend> {
        ToyBatch {
            ids: batch.ids.clone().inner(),
            targets: batch.targets.clone().inner(),
            weights: batch.weights.clone().inner(),
        }
    }

    fn visit_segment<V: ModuleVisitor<B>>(&self, segment: usize, visitor: &mut V) {
        fn within<B: Backend, const D: usize>(name: &str, p: &Param<Tensor<B, D>>, v: &mut impl ModuleVisitor<B>) {
            v.enter_module(name, "");
            v.visit_float(p);
            v.exit_module(name, "");
        }
        match segment {
            0 => within("embed", &self.embed, visitor),
            1 => {
                within("up", &self.up, visitor);
                within("up_bias", &self.up_bias, visitor);
            }
            2 => within("down", &self.down, visitor),
            _ => {
                within("norm", &self.norm, visitor);
                match &self.head {
                    Some(head) => within("head", head, visitor),
                    None => within("embed", &self.embed, visitor),
                }
            }
        }
    }
}

/// Freezes the parameters with these names.
struct FreezeParams<'a>(&'a [&'a str], String);

impl ModuleMapper<TestBackend> for FreezeParams<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.1 = name.to_owned();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<TestBackend, D>>) -> Param<Tensor<TestBackend, D>> {
        let frozen = self.0.contains(&self.1.as_str());
        param.set_require_grad(!frozen)
    }
}

pub(crate) fn frozen(names: &[&str]) -> Toy<TestBackend> {
    freeze(toy(), names)
}

pub(crate) fn freeze(model: Toy<TestBackend>, names: &[&str]) -> Toy<TestBackend> {
    model.map(&mut FreezeParams(names, String::new()))
}

type HookCalls = Vec<Vec<(String, Vec<f32>)>>;

/// Returns the loss and, for every call of the sink, paths and gradients.
fn segment_gradients(model: &Toy<TestBackend>, checkpointing: Checkpointing) -> (Vec<f32>, HookCalls) {
    let mut found = vec![];
    let loss =
        forward_backward::<TestBackend, _>(model, &ToyBatch::new(0, 20, 13.0), checkpointing, &mut |gradients| {
            let host = |g: Gradient<Flex>| (g.path, g.value.flatten().into_data().to_vec::<f32>().unwrap());
            found.push(gradients.into_iter().map(host).collect());
        });
    (loss.flatten().into_data().to_vec().unwrap(), found)
}

struct TakeGradients(Option<<TestBackend as AutodiffBackend>::Gradients>, String, Vec<(String, Vec<f32>)>);

impl ModuleVisitor<TestBackend> for TakeGradients {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.1 = name.to_owned();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<TestBackend, D>>) {
        if let Some(gradient) = param.val().grad_remove(self.0.as_mut().unwrap()) {
            self.2.push((self.1.clone(), gradient.into_data().to_vec().unwrap()));
        }
    }
}

/// Returns the same as computed by one backward pass through the whole model, sorted by path.
fn full_backward_gradients(model: &Toy<TestBackend>) -> (Vec<f32>, Vec<(String, Vec<f32>)>) {
    let batch = ToyBatch::new(0, 20, 13.0);
    let loss = (0..4).fold(vec![], |values, i| model.forward_segment(i, &batch, values)).remove(0).tensor::<1>();
    let mut read = TakeGradients(Some(loss.backward()), String::new(), vec![]);
    model.visit(&mut read);
    read.2.sort_by(|a, b| a.0.cmp(&b.0));
    (loss.into_data().to_vec().unwrap(), read.2)
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
    assert!(largest > 1e-4, "{what}: a gradient of {largest} proves nothing");
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() <= 1e-6 * largest, "{what}: {a} against {b}");
    }
}

#[test]
fn segment_by_segment_equals_one_backward_pass() {
    let _alone = backward_lock();
    let everything = ["embed", "up", "up_bias", "down", "norm"];
    let table: [(&[&str], &[&str]); 5] = [
        (&[], &everything),
        (&["embed"], &["up", "up_bias", "down", "norm"]),
        (&["embed", "up", "up_bias"], &["down", "norm"]),
        (&["embed", "down", "norm"], &["up", "up_bias"]),
        (&["up", "up_bias", "down", "norm"], &["embed"]),
    ];
    for (names, trainable) in table {
        let model = frozen(names);
        let (expected_loss, expected) = full_backward_gradients(&model);
        let retained = segment_gradients(&model, Checkpointing::None);
        for checkpointing in [
            Checkpointing::None,
            Checkpointing::Every(2),
            Checkpointing::Every(1),
            Checkpointing::Full,
            Checkpointing::All,
        ] {
            let (loss, found) = segment_gradients(&model, checkpointing);
            let what = format!("{names:?} frozen, {checkpointing:?}");
            assert_eq!((&loss, &found), (&retained.0, &retained.1), "{what}: recomputed is not retained");
            assert_close(&loss, &expected_loss, &what);
            let mut found: Vec<_> = found.into_iter().flatten().collect();
            found.sort_by(|a, b| a.0.cmp(&b.0));
            assert_eq!(found.len(), trainable.len(), "{what}: one gradient per trainable parameter");
            for ((path, found), (expected_path, expected)) in found.iter().zip(&expected) {
                assert_eq!(path, expected_path, "{what}");
                assert!(trainable.contains(&path.as_str()), "{what}: {path}");
                assert_close(found, expected, &format!("{what}: {path}"));
            }
        }
    }
}

#[test]
fn gradients_come_last_segment_first_and_tied_ones_with_their_first_use() {
    let _alone = backward_lock();
    for checkpointing in [Checkpointing::None, Checkpointing::Full] {
        let (_, found) = segment_gradients(&toy(), checkpointing);
        let paths: Vec<Vec<&str>> =
            found.iter().map(|part| part.iter().map(|(path, _)| path.as_str()).collect()).collect();
        assert_eq!(paths, [vec!["norm"], vec!["down"], vec!["up", "up_bias"], vec!["embed"]]);
    }
}

#[test]
fn a_model_without_trainable_parameters_has_a_loss_and_no_gradients() {
    let _alone = backward_lock();
    let (loss, found) = segment_gradients(&frozen(&["embed", "up", "up_bias", "down", "norm"]), Checkpointing::Full);
    assert_eq!((loss.len(), found.len()), (20, 0));
}

#[test]
#[should_panic(expected = "rank 2")]
fn a_value_keeps_its_rank() {
    DynTensor::new(Tensor::<Flex, 1>::ones([3], &Default::default())).tensor::<2>();
}
