//! What a program may not have done before it reads, as the reasons have it.

pub(crate) const OUTPUT: &str = "output";
pub(crate) const HOST_CALL: &str = "host call";
pub(crate) const EXIT: &str = "it ends without reading";
