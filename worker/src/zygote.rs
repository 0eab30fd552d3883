//! The snapshot role where processes can be copied: start the policy once, then fork for every
//! worker that goes on from there.
#![forbid(unsafe_code)]

use std::mem::ManuallyDrop;

use conclave_ipc::exit::WorkerExit;
use conclave_ipc::message::{FaultClass, Reply, Request};

use crate::confine::{Ladder, Side, Zygote, reap};
use crate::policy::{Policy, describe};
use crate::serve::{self, Loaded};
use crate::session::Session;
use crate::{Channel, exit_for};

/// What the supervisor wants of a zygote.
enum Order {
    Fork,
    Reap { child: u32 },
}

/// Forks until the channel is closed or something breaks; in the new process, evaluates. Guest
/// code runs behind the proof that a zygote's filter is on, or the serving filter.
pub(crate) fn run(
    zygote: &Zygote,
    loaded: ManuallyDrop<Loaded>,
    mut channel: Channel,
    ladder: &impl Ladder,
) -> WorkerExit {
    if let Err(error) = channel.send(&Reply::Loaded(zygote.report())) {
        return exit_for(&error);
    }
    let session = Session::new(channel);
    let template = ManuallyDrop::into_inner(loaded).template;
    let mut policy = ManuallyDrop::new(Policy::new(template, session.clone()));
    if let Some(exit) = serve::start(&session, &mut policy) {
        return exit;
    }
    session.take_descriptors(true);
    loop {
        let order = session.receive(|request| match request {
            Request::Fork => Some(Order::Fork),
            Request::Reap { child } => Some(Order::Reap { child }),
            _ => None,
        });
        let sent = match order {
            Ok(Some(Order::Reap { child })) => match reap(child) {
                Ok(status) => session.send(&Reply::Reaped { status }),
                Err(error) => refuse(&session, &format!("process {child}: {error}")),
            },
            Ok(Some(Order::Fork)) => {
                let Some(channel) = session.descriptor() else {
                    return WorkerExit::ProtocolViolation;
                };
                match zygote.fork(channel, ladder) {
                    Ok(Side::Zygote { child }) => session.send(&Reply::Forked { child }),
                    Ok(Side::Worker(Ok(sealed))) => {
                        session.take_descriptors(false);
                        return serve::evaluate(&sealed, &session, policy);
                    }
                    // Its channel may still be the zygote's.
                    Ok(Side::Worker(Err(_))) => return WorkerExit::ConfineFailed,
                    Err(error) => refuse(&session, &error.to_string()),
                }
            }
            Ok(None) => return WorkerExit::ProtocolViolation,
            Err(error) => return exit_for(&error),
        };
        if let Err(error) = sent {
            return exit_for(&error);
        }
    }
}

/// What can't be done does not end a zygote: others may still need it.
fn refuse(session: &Session, message: &str) -> Result<(), conclave_ipc::channel::ChannelError> {
    let class = FaultClass::Confinement;
    session.send(&Reply::Fault { id: None, class, message: describe(message) })
}
