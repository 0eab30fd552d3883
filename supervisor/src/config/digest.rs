//! The hashes that pin modules.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};
use thiserror::Error;

/// A SHA-256 hash. Written as `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Sha256Digest([u8; 32]);

impl Sha256Digest {
    /// The hash of `bytes`.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Sha256Digest {
    type Err = DigestError;

    /// Reads 64 hexadecimal digits in either case, with or without `sha256:` before them.
    fn from_str(text: &str) -> Result<Self, DigestError> {
        let digits = text.strip_prefix("sha256:").unwrap_or(text).as_bytes();
        let mut hash = [0; 32];
        if digits.len() != 2 * hash.len() {
            return Err(DigestError);
        }
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            for digit in pair {
                *byte = (*byte << 4) | hex_value(*digit).ok_or(DigestError)?;
            }
        }
        Ok(Self(hash))
    }
}

fn hex_value(digit: u8) -> Option<u8> {
    let value = char::from(digit).to_digit(16)?;
    u8::try_from(value).ok()
}

/// A text is not a [`Sha256Digest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("expected 64 hexadecimal digits, with or without \"sha256:\" before them")]
pub(crate) struct DigestError;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{DIGEST, policy_refusal};

    #[test]
    fn digests_are_read_in_both_forms_and_written_in_one() {
        let digest = Sha256Digest::of(b"abc");
        assert_eq!(digest.to_string(), format!("sha256:{DIGEST}"));
        for text in [DIGEST.to_owned(), format!("sha256:{DIGEST}"), DIGEST.to_uppercase()] {
            assert_eq!(text.parse(), Ok(digest), "{text}");
        }
        let multibyte = "é".repeat(32);
        for text in ["", "sha256:", &DIGEST[1..], &format!("{DIGEST}0"), &multibyte] {
            assert_eq!(text.parse::<Sha256Digest>(), Err(DigestError), "{text}");
        }
        let signed = format!("+{}", &DIGEST[1..]);
        assert_eq!(signed.parse::<Sha256Digest>(), Err(DigestError));
        assert_eq!(
            policy_refusal("sha256: sha512:abc"),
            "3:11: policy \"p\": sha256: expected 64 hexadecimal digits, with or without \
             \"sha256:\" before them"
        );
    }
}
