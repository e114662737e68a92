//! What a peer sends costs no more than a small multiple of its length to decode. Also for the descriptions
//! and states of VMMs.

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// Decodes a list, and refuses it as soon as it has more than `MOST` elements: elements may take much more
/// room here than in what was sent. For `#[serde(deserialize_with = "…")]`.
///
/// # Errors
/// Those of the deserializer, and for a longer list.
pub fn at_most<'de, const MOST: usize, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct List<const MOST: usize, T>(PhantomData<T>);

    impl<'de, const MOST: usize, T: Deserialize<'de>> Visitor<'de> for List<MOST, T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MOST} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut elements = Vec::new();
            while let Some(element) = list.next_element()? {
                if elements.len() == MOST {
                    return Err(A::Error::custom(format_args!("more than {MOST} elements")));
                }
                elements.push(element);
            }
            Ok(elements)
        }
    }
    deserializer.deserialize_seq(List::<MOST, T>(PhantomData))
}

/// For `#[serde(with = "…")]`: bytes that are copied as a whole and not one by one, as a list of numbers
/// would be. What travels is the same.
pub mod bytes {
    use super::{Deserializer, Visitor, fmt};
    use serde::Serializer;

    /// As a whole.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    /// As a whole.
    ///
    /// # Errors
    /// Those of the deserializer.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;

        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }

            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_list_with_too_many_elements_costs_no_memory() {
        thread_local!(static MADE: Cell<usize> = const { Cell::new(0) });
        struct Element;
        impl<'de> Deserialize<'de> for Element {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                MADE.set(MADE.get() + 1);
                u8::deserialize(deserializer).map(|_| Element)
            }
        }
        let mut frame = vec![0x80, 0x80, 0x40];
        frame.resize(3 + (1 << 20), 0);
        let mut list = postcard::Deserializer::from_bytes(&frame);
        assert!(at_most::<8, Element, _>(&mut list).is_err());
        assert!(MADE.get() <= 9, "{} elements were made of a million", MADE.get());
    }
}
