//! The encoding of protocol buffers.

/// A protocol buffer message that is being encoded. Source: <https://protobuf.dev/programming-guides/encoding/>
#[derive(Debug, Clone, Default)]
pub(super) struct ProtoMessage(Vec<u8>);

impl ProtoMessage {
    const VARINT: u64 = 0;
    const FIXED64: u64 = 1;
    const BYTES: u64 = 2;
    const FIXED32: u64 = 5;

    /// Appends a field of type `int32`, `int64`, `bool` or an enumeration, not negative. A zero is left out, as
    /// encoders do.
    pub(super) fn integer(self, field: u64, value: u64) -> Self {
        if value == 0 { self } else { self.tag(field, Self::VARINT).varint(value) }
    }

    pub(super) fn double(mut self, field: u64, value: f64) -> Self {
        self = self.tag(field, Self::FIXED64);
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn float(mut self, field: u64, value: f32) -> Self {
        self = self.tag(field, Self::FIXED32);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Appends a field of type `string` or `bytes`.
    pub(super) fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Self {
        self = self.tag(field, Self::BYTES).varint(value.as_ref().len() as u64);
        self.0.extend(value.as_ref());
        self
    }

    pub(super) fn message(self, field: u64, value: ProtoMessage) -> Self {
        self.bytes(field, value.0)
    }

    /// Returns the encoded bytes.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn tag(self, field: u64, kind: u64) -> Self {
        self.varint(field << 3 | kind)
    }

    fn varint(mut self, mut value: u64) -> Self {
        while value > 0x7f {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of protobuf.dev, "Encoding": field 1 with the value 150, and the string "testing" in field 2.
    #[test]
    fn fields_are_encoded_as_documented() {
        assert_eq!(ProtoMessage::default().integer(1, 150).into_bytes(), [0x08, 0x96, 0x01]);
        assert!(ProtoMessage::default().integer(1, 0).into_bytes().is_empty());
        assert_eq!(ProtoMessage::default().bytes(2, "testing").into_bytes(), *b"\x12\x07testing");
        assert_eq!(
            ProtoMessage::default().message(3, ProtoMessage::default().integer(1, 150)).into_bytes(),
            *b"\x1a\x03\x08\x96\x01"
        );
        assert_eq!(ProtoMessage::default().float(2, 1.0).into_bytes(), [0x15, 0, 0, 0x80, 0x3f]);
        assert_eq!(ProtoMessage::default().double(200, 1.0).into_bytes(), [0xc1, 0x0c, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f]);
    }
}
