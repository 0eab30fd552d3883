//! Why there is no verdict, and what a client is told about it.

use std::fmt;

use conclave_ipc::message::Contract;

/// Before the texts of most faults.
const FAULT_PREFIX: &str = "internal server error: ";

/// Why there is no verdict. `Display` is the text for the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// A waPC guest returned an error, trapped, or answered nothing.
    GuestCall(String),
    /// A WASI command trapped or exited with an error; this is its stderr.
    GuestExit(String),
    /// A Rego policy was aborted, trapped, or can't judge such a request.
    Evaluation(String),
    /// The answer does not parse.
    InvalidResponse(Contract, String),
    /// The evaluation took too long. The text is the same for every runtime: a WASI command
    /// that is interrupted has rarely written anything, and an empty message helps nobody.
    Deadline,
    /// The policy could not be run: no worker, or the worker was lost.
    Unavailable(String),
    /// The policy never got ready: not fetched, not verified, or settings refused. The text
    /// says which.
    Initialisation(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestCall(error) => {
                write!(formatter, "{FAULT_PREFIX}Guest call failure: {error}")
            }
            Self::GuestExit(stderr) => formatter.write_str(stderr.trim()),
            Self::InvalidResponse(contract, error) => {
                let what = match contract {
                    Contract::Wapc => "invalid response from policy",
                    Contract::Wasi => "Cannot deserialize policy validation response",
                    Contract::Opa => "cannot interpret OPA policy result",
                    Contract::Gatekeeper => "cannot interpret Gatekeeper policy result",
                };
                write!(formatter, "{FAULT_PREFIX}{what}: {error}")
            }
            Self::Deadline => formatter.write_str(
                "Policy execution interrupted because it exceeded the allowed execution time",
            ),
            Self::Evaluation(reason) | Self::Unavailable(reason) => {
                write!(formatter, "{FAULT_PREFIX}{reason}")
            }
            Self::Initialisation(error) => formatter.write_str(error),
        }
    }
}
