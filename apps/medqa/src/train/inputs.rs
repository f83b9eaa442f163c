//! The inputs of a run, by count and digest: a resumed run must have the same.

use crate::model::LoadedModel;
use anyhow::{Result, bail};
use burn_llama::{ChatTemplate, Example, Tokenizer, kernel::Kernels};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Encoded rows: their number, and the SHA-256 of their ids and loss masks in order, in hexadecimal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RowsDigest {
    pub rows: usize,
    pub sha256: String,
}

impl RowsDigest {
    fn new<'a>(files: impl Iterator<Item = &'a [Example]>) -> Self {
        let (mut digest, mut rows) = (Sha256::new(), 0);
        for file in files {
            digest.update((file.len() as u64).to_le_bytes());
            rows += file.len();
            for Example { ids, loss_mask } in file {
                digest.update((ids.len() as u64).to_le_bytes());
                digest.update(ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>());
                digest.update(loss_mask.iter().map(|&learned| u8::from(learned)).collect::<Vec<u8>>());
            }
        }
        Self { rows, sha256: format!("{:x}", digest.finalize()) }
    }
}

/// The inputs of a run, which stand in `inputs.json` and in every checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct RunInputs {
    /// The training rows.
    pub train: RowsDigest,
    /// The validation rows that are evaluated.
    pub valid: RowsDigest,
    /// The SHA-256 of the texts of all token ids.
    pub vocabulary: String,
    /// The SHA-256 of the chat template's source; none without a template.
    pub chat_template: Option<String>,
    /// The local time that the chat template saw, if it looks at the clock. A resumed run sees the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_time: Option<String>,
}

impl RunInputs {
    /// Computes the digests of encoded rows and of the model's tokenizer.
    ///
    /// # Errors
    /// If a token id cannot be decoded.
    pub(super) fn new<B: Kernels>(loaded: &LoadedModel<B>, train: &[Vec<Example>], valid: &[Example]) -> Result<Self> {
        let (tokenizer, mut vocabulary) = (&loaded.tokenizer, Sha256::new());
        for id in 0..loaded.model.config().vocab_size as u32 {
            let text = tokenizer.decode(&[id], false)?;
            vocabulary.update((text.len() as u64).to_le_bytes());
            vocabulary.update(text);
        }
        let template = tokenizer.chat_template().map(|template| format!("{:x}", Sha256::digest(template.source())));
        Ok(Self {
            train: RowsDigest::new(train.iter().map(Vec::as_slice)),
            valid: RowsDigest::new([valid].into_iter()),
            vocabulary: format!("{:x}", vocabulary.finalize()),
            chat_template: template,
            template_time: tokenizer.chat_template().filter(|template| sees_clock(template)).map(ChatTemplate::time),
        })
    }

    /// Describes every difference to the inputs that the run had before; none if they are the same.
    pub(super) fn differences(&self, before: &Self) -> Vec<String> {
        let rows = |name: &str, before: &RowsDigest, now: &RowsDigest| {
            let describe = |rows: &RowsDigest| format!("{} (sha256 {})", rows.rows, short(&rows.sha256));
            (before != now).then(|| format!("the {name} rows were {}, now {}", describe(before), describe(now)))
        };
        let text = |name: &str, before: Option<&str>, now: Option<&str>| {
            let describe = |digest: Option<&str>| digest.map_or("none".to_owned(), |digest| short(digest).to_owned());
            (before != now).then(|| format!("the {name} was {}, now {}", describe(before), describe(now)))
        };
        [
            rows("training", &before.train, &self.train),
            rows("validation", &before.valid, &self.valid),
            text("vocabulary (sha256)", Some(&before.vocabulary), Some(&self.vocabulary)),
            text("chat template (sha256)", before.chat_template.as_deref(), self.chat_template.as_deref()),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Returns a number for a comparison between ranks: the first 40 bits of a digest of everything, of which sums over
    /// thousands of ranks are exact in f64.
    ///
    /// # Errors
    /// If the inputs cannot be written as JSON.
    pub(super) fn fingerprint(&self) -> Result<f64> {
        // The clocks of two ranks may differ by a second; what they change shows in the rows.
        let digest = Sha256::digest(serde_json::to_vec(&Self { template_time: None, ..self.clone() })?);
        Ok(digest.iter().take(5).fold(0.0, |number, &byte| number * 256.0 + f64::from(byte)))
    }
}

fn sees_clock(template: &ChatTemplate) -> bool {
    template.source().contains("strftime_now")
}

/// Sets the clock of the chat template to the time that a run to be resumed has kept.
///
/// # Errors
/// If the time is none.
pub(super) fn with_time_of_run(tokenizer: Tokenizer, inputs: Option<&RunInputs>) -> Result<Tokenizer> {
    let time = inputs.and_then(|inputs| inputs.template_time.as_deref());
    Ok(match (tokenizer.chat_template().cloned(), time) {
        (Some(template), Some(time)) => tokenizer.with_chat_template(template.with_time(time)?),
        _ => tokenizer,
    })
}

/// Returns the beginning of a digest, for messages.
fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

/// Compares the inputs with those that the run had `before`. If they differ and may change, returns a note for the run's
/// record.
///
/// # Errors
/// One line that names every difference, if they may not change.
pub(super) fn compare(before: &RunInputs, now: &RunInputs, may_change: bool) -> Result<Option<String>> {
    let differences = now.differences(before).join("; ");
    match (differences.is_empty(), may_change) {
        (true, _) => Ok(None),
        (false, true) => Ok(Some(format!("the run goes on with other data: {differences}"))),
        (false, false) => bail!(
            "expected the data of the run: {differences}; use the same data, or go on by --resume --allow-changed-data"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(ids: &[&[u32]]) -> RowsDigest {
        let rows: Vec<Example> = ids.iter().map(|ids| Example::new(&ids[..1], &ids[1..], usize::MAX)).collect();
        RowsDigest::new([rows.as_slice()].into_iter())
    }

    #[test]
    fn a_digest_depends_on_ids_masks_and_their_order() {
        let first = rows(&[&[1, 2, 3], &[4, 5]]);
        assert_eq!(first, rows(&[&[1, 2, 3], &[4, 5]]));
        for other in [rows(&[&[4, 5], &[1, 2, 3]]), rows(&[&[1, 2], &[3, 4, 5]]), rows(&[&[1, 2, 3], &[4, 6]])] {
            assert_eq!(other.rows, 2);
            assert_ne!(other.sha256, first.sha256);
        }
        let example = Example { ids: vec![1, 2, 3], loss_mask: vec![false, false, true] };
        let other = Example { loss_mask: vec![false, true, true], ..example.clone() };
        assert_ne!(RowsDigest::new([&[example][..]].into_iter()), RowsDigest::new([&[other][..]].into_iter()));
    }

    #[test]
    fn other_inputs_are_refused_or_noted() {
        let now = RunInputs { train: rows(&[&[1, 2]]), ..RunInputs::default() };
        let before = RunInputs { train: rows(&[&[1, 2], &[3, 4]]), chat_template: Some("ab".into()), ..now.clone() };
        assert_eq!(compare(&now, &now, false).unwrap(), None);
        let error = compare(&before, &now, false).unwrap_err().to_string();
        let named = ["the training rows were 2 (sha256 ", ", now 1 (sha256 ", "template (sha256) was ab, now none"];
        assert!(named.iter().all(|words| error.contains(words)), "{error}");
        assert!(error.ends_with("--resume --allow-changed-data") && !error.contains("validation"), "{error}");
        assert!(compare(&before, &now, true).unwrap().unwrap().contains("the training rows were 2"));
        assert_ne!(before.fingerprint().unwrap(), now.fingerprint().unwrap());
    }
}
