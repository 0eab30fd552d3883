//! A Landlock domain without a single rule.
//!
//! Lost: opening, executing, creating or removing any file; TCP; from ABI 6 on also
//! abstract Unix sockets and signals to processes outside. Descriptors stay usable.
#![forbid(unsafe_code)]

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset,
    RulesetAttr, RulesetError, Scope,
};

/// The newest ABI whose rights are asked for; older kernels give what they know.
const NEWEST: ABI = ABI::V7;

/// The ABI in force; 0 where the kernel has no Landlock.
///
/// # Errors
/// The kernel has Landlock and refuses the domain.
pub(super) fn forbid_everything() -> io::Result<u8> {
    let status = restrict().map_err(io::Error::other)?;
    Ok(match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi.min(NEWEST) as u8,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
    })
}

fn restrict() -> Result<landlock::RestrictionStatus, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .restrict_self()
}
