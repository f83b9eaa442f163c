//! The format of messages. All numbers are little-endian.
//!
//! ```text
//!  count: u32
//!  per value:  1 if there is a tensor, plus 2 if its gradient is wanted: u8
//!              of a tensor: dtype: u8, rank: u8, rank · size: u64
//!  the elements of all tensors, one tensor after the other
//! ```

use super::{Ends, P2pValue};
use crate::{Error, bucket::tensor_from_bytes, comm::CommVolume};
use burn::tensor::{DType, backend::Backend};

/// The dtypes of tensors, by their numbers in a message.
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const TENSOR: u8 = 1;
const REQUIRES_GRAD: u8 = 2;

/// An encoded message and the volumes of its two parts.
pub(super) struct EncodedMessage {
    pub bytes: Vec<u8>,
    /// The volume of the description, in units of four bytes.
    pub header: CommVolume,
    pub values: CommVolume,
}

/// The description of a value.
struct ValueHeader {
    requires_grad: bool,
    tensor: Option<TensorHeader>,
}

struct TensorHeader {
    dtype: DType,
    dims: Vec<usize>,
    bytes: usize,
}

/// Checks that all tensors have a dtype that a message can hold.
pub(super) fn check<B: Backend>(values: &[P2pValue<B>], ends: Ends) -> Result<(), Error> {
    let dtypes = values.iter().filter_map(|value| value.tensor.as_ref()).map(|tensor| tensor.dtype());
    match dtypes.into_iter().find(|dtype| !DTYPES.contains(dtype)) {
        Some(dtype) => Err(ends.unexpected("a tensor in f32, f16 or bf16", format!("one in {dtype:?}"))),
        None => Ok(()),
    }
}

/// Copies values that have passed [`check`] to the host.
pub(super) fn encode<B: Backend>(values: Vec<P2pValue<B>>) -> EncodedMessage {
    let mut bytes = (values.len() as u32).to_le_bytes().to_vec();
    for P2pValue { tensor, requires_grad } in &values {
        let grad = if *requires_grad { REQUIRES_GRAD } else { 0 };
        let Some(tensor) = tensor else {
            bytes.push(grad);
            continue;
        };
        let (dims, dtype) = (tensor.dims(), DTYPES.iter().position(|&dtype| dtype == tensor.dtype()));
        bytes.extend([grad | TENSOR, dtype.unwrap_or_default() as u8, dims.len() as u8]);
        bytes.extend(dims.iter().flat_map(|&size| (size as u64).to_le_bytes()));
    }
    let header = bytes.len() as u64;
    let tensors = || values.iter().filter_map(|value| value.tensor.as_ref());
    let elements = tensors().map(|tensor| tensor.elements() as u64).sum();
    // There is place for one more byte, because a communicator appends the operation.
    bytes.reserve_exact(tensors().map(|tensor| tensor.bytes()).sum::<usize>() + 1);
    for tensor in values.into_iter().filter_map(|value| value.tensor) {
        bytes.extend_from_slice(tensor.flatten().into_data().as_bytes());
    }
    let values = CommVolume { elements, bytes: bytes.len() as u64 - header };
    EncodedMessage { bytes, header: CommVolume { elements: header / 4, bytes: header }, values }
}

/// Creates the values of a message on a device.
pub(super) fn decode<B: Backend>(message: &[u8], ends: Ends, device: &B::Device) -> Result<Vec<P2pValue<B>>, Error> {
    let mut reader = MessageReader { rest: message, ends };
    let count = u32::from_le_bytes(reader.array("a number of values")?);
    let headers = (0..count).map(|_| reader.value_header()).collect::<Result<Vec<_>, _>>()?;
    let mut values = Vec::with_capacity(headers.len());
    for ValueHeader { requires_grad, tensor } in headers {
        let tensor = match tensor {
            None => None,
            Some(TensorHeader { dtype, dims, bytes }) => {
                let elements = reader.take(bytes, "elements")?;
                Some(tensor_from_bytes(elements, &dims, dtype, device))
            }
        };
        values.push(P2pValue { tensor, requires_grad });
    }
    match reader.rest.len() {
        0 => Ok(values),
        more => Err(ends.unexpected("the end of the message", format!("{more} bytes more"))),
    }
}

/// The part of a message that has not been read.
struct MessageReader<'a> {
    rest: &'a [u8],
    ends: Ends,
}

impl<'a> MessageReader<'a> {
    fn take(&mut self, length: usize, content: &str) -> Result<&'a [u8], Error> {
        let Some((taken, rest)) = self.rest.split_at_checked(length) else {
            let expected = format!("{length} bytes of {content}");
            return Err(self.ends.unexpected(expected, format!("a message that has {} bytes left", self.rest.len())));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, content: &str) -> Result<[u8; N], Error> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, content)?);
        Ok(array)
    }

    fn value_header(&mut self) -> Result<ValueHeader, Error> {
        let [flags] = self.array("the kind of a value")?;
        if flags > TENSOR | REQUIRES_GRAD {
            return Err(self.ends.unexpected("a kind of value from 0 to 3", flags.to_string()));
        }
        let tensor = if flags & TENSOR == 0 { None } else { Some(self.tensor_header()?) };
        Ok(ValueHeader { requires_grad: flags & REQUIRES_GRAD != 0, tensor })
    }

    fn tensor_header(&mut self) -> Result<TensorHeader, Error> {
        let [dtype, rank] = self.array("a dtype and a rank")?;
        let Some(&dtype) = DTYPES.get(usize::from(dtype)) else {
            return Err(self.ends.unexpected("a dtype from 0 to 2", dtype.to_string()));
        };
        let sizes = (0..rank).map(|_| Ok(u64::from_le_bytes(self.array("a shape")?) as usize));
        let dims = sizes.collect::<Result<Vec<_>, Error>>()?;
        let bytes = dims.iter().try_fold(dtype.size(), |bytes, &size| bytes.checked_mul(size));
        let bytes = bytes.ok_or_else(|| self.ends.unexpected("a shape that fits the memory", format!("{dims:?}")))?;
        Ok(TensorHeader { dtype, dims, bytes })
    }
}
