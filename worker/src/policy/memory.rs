//! Guest memory as seen from host functions: every pointer and length is an unsigned
//! 32-bit number from an attacker, and every access outside ends the guest.
#![forbid(unsafe_code)]

use std::ffi::CStr;
use std::ops::Range;

use wasmtime::{Caller, Error, Extern, Memory, Result};

use super::guest::Guest;

/// A guest's pointer or length as it arrives: the same bits, unsigned.
pub(super) const fn unsigned(value: i32) -> u32 {
    value.cast_unsigned()
}

/// The memory that a guest exports, which the contracts require.
pub(super) fn exported(caller: &mut Caller<'_, Guest>) -> Result<Memory> {
    match caller.get_export("memory") {
        Some(Extern::Memory(memory)) => Ok(memory),
        _ => Err(Error::msg("the module does not export a memory named \"memory\"")),
    }
}

/// The bytes of the guest's memory, and its host state.
pub(super) fn split<'a>(
    caller: &'a mut Caller<'_, Guest>,
) -> Result<(&'a mut [u8], &'a mut Guest)> {
    let memory = exported(caller)?;
    Ok(memory.data_and_store_mut(caller))
}

fn range(pointer: u32, length: u32) -> Range<usize> {
    let start = pointer as usize;
    start..start.saturating_add(length as usize)
}

fn outside(pointer: u32, length: u32) -> Error {
    Error::msg(format!("out-of-range pointer: {length} bytes at {pointer:#x}"))
}

/// `length` bytes at `pointer`.
pub(super) fn slice(data: &[u8], pointer: u32, length: u32) -> Result<&[u8]> {
    data.get(range(pointer, length)).ok_or_else(|| outside(pointer, length))
}

/// `length` bytes at `pointer`, to be written.
pub(super) fn slice_mut(data: &mut [u8], pointer: u32, length: u32) -> Result<&mut [u8]> {
    data.get_mut(range(pointer, length)).ok_or_else(|| outside(pointer, length))
}

/// The bytes at `pointer` up to the first zero, which is to come after `bytes_max` of them at
/// the latest; `None` if it does not.
pub(super) fn until_zero(data: &[u8], pointer: u32, bytes_max: usize) -> Result<Option<&[u8]>> {
    let rest = data.get(pointer as usize..).ok_or_else(|| outside(pointer, 1))?;
    let end = rest.len().min(bytes_max.saturating_add(1));
    match CStr::from_bytes_until_nul(rest.get(..end).unwrap_or_default()) {
        Ok(text) => Ok(Some(text.to_bytes())),
        Err(_) if rest.len() > bytes_max => Ok(None),
        Err(_) => Err(Error::msg(format!("text without an end at {pointer:#x}"))),
    }
}

/// Writes all of `bytes` at `pointer`.
pub(super) fn write(data: &mut [u8], pointer: u32, bytes: &[u8]) -> Result<()> {
    let length = u32::try_from(bytes.len())?;
    slice_mut(data, pointer, length)?.copy_from_slice(bytes);
    Ok(())
}

/// A little-endian `u32` at `pointer`.
pub(super) fn read_u32(data: &[u8], pointer: u32) -> Result<u32> {
    let bytes = slice(data, pointer, 4)?.first_chunk().ok_or_else(|| outside(pointer, 4))?;
    Ok(u32::from_le_bytes(*bytes))
}

/// A little-endian `u64` at `pointer`.
pub(super) fn read_u64(data: &[u8], pointer: u32) -> Result<u64> {
    let bytes = slice(data, pointer, 8)?.first_chunk().ok_or_else(|| outside(pointer, 8))?;
    Ok(u64::from_le_bytes(*bytes))
}

/// What a guest asks of the host.
#[derive(Debug)]
pub(super) struct HostCall<'a> {
    pub(super) binding: &'a str,
    pub(super) namespace: &'a str,
    pub(super) operation: &'a str,
    pub(super) payload: &'a [u8],
}

/// The parts of a host call as both contracts pass them: pointer and length of each.
pub(super) fn host_call(data: &[u8], words: [i32; 8]) -> Result<HostCall<'_>> {
    let [
        binding,
        binding_length,
        namespace,
        namespace_length,
        operation,
        operation_length,
        payload,
        payload_length,
    ] = words.map(unsigned);
    Ok(HostCall {
        binding: text(data, binding, binding_length)?,
        namespace: text(data, namespace, namespace_length)?,
        operation: text(data, operation, operation_length)?,
        payload: slice(data, payload, payload_length)?,
    })
}

/// `length` bytes of text at `pointer`.
fn text(data: &[u8], pointer: u32, length: u32) -> Result<&str> {
    std::str::from_utf8(slice(data, pointer, length)?)
        .map_err(|error| Error::msg(format!("text at {pointer:#x} is not UTF-8: {error}")))
}
