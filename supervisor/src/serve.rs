//! `conclave serve`: the daemon's life, from its arguments to its exit.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use sd_notify::NotifyState;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Duration, timeout};

use crate::cli::ServeOptions;
use crate::config::{self, ConfigError, PolicySpec};
use crate::http::{self, Daemon, Peer};
use crate::listen::{AllowedPeers, ListenError, Socket};
use crate::log::shorten;
use crate::metadata::Execution;
use crate::policy::{Environment, Policy, Starting};
use crate::startup::{self, StartupError, take_control_group};

/// Connections at a time; further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 1024;

/// No policy gets more workers than this unless it is said; each is a process.
const WORKERS_DEFAULT_MAX: usize = 4;

/// Wait after `accept` failed, for example for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long killed workers may take to be gone.
const WORKERS_TIME_MAX: Duration = Duration::from_secs(2);

/// Why the daemon can't serve.
#[derive(Debug, Error)]
pub(crate) enum ServeError {
    /// The process can't run workers.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The socket can't be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The signal handlers can't be had.
    #[error("can't start {0}: {1}")]
    Io(&'static str, io::Error),
}

/// Serves until it is told to stop.
///
/// # Errors
/// It could not start. A policy that can't be loaded is no such error: the others serve.
pub(crate) fn run(options: &ServeOptions) -> Result<(), ServeError> {
    let prepared = startup::prepare(&options.workers_options.program)?;
    let specs = config::load(&options.policies)?;
    let runtime = startup::runtime()?;
    runtime.block_on(async {
        let workers = options
            .workers
            .map_or_else(|| startup::processors().min(WORKERS_DEFAULT_MAX), usize::from);
        let starting = Starting {
            mode: options.start,
            age_max: options.snapshot_max_age,
            uses_max: options.snapshot_max_uses,
        };
        let (options_of_workers, delegation) = (&options.workers_options, take_control_group());
        let environment = prepared
            .environment(options_of_workers, workers, starting, Execution::Metadata, delegation)
            .await?;
        serve(options, Arc::new(environment), specs).await
    })
}

async fn serve(
    options: &ServeOptions,
    environment: Arc<Environment>,
    specs: Vec<PolicySpec>,
) -> Result<(), ServeError> {
    let mut stop = StopSignals::new().map_err(|error| ServeError::Io("signal handling", error))?;
    let socket =
        Socket::bind(&options.socket, options.socket_mode, options.socket_group.as_deref())?;
    let policies: Vec<_> =
        specs.into_iter().map(|spec| Arc::new(Policy::new(spec, &environment))).collect();
    let daemon = Arc::new(daemon(options, &environment, &policies));
    tracing::info!(socket = %options.socket.display(), policies = policies.len(), "listening");

    let (stopping, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let loading = tokio::spawn(load_all(policies.clone(), Arc::clone(&environment)));
    tokio::select! {
        () = accept(&socket, &daemon, &mut connections, &stopped) => {}
        () = stop.received() => {}
    }
    loading.abort();
    for policy in &policies {
        policy.turn_away_waiting();
    }
    notify(&[NotifyState::Stopping]);
    tracing::info!("stopping: finishing what is in flight");
    // Removes the socket: from now on nobody can connect.
    drop(socket);
    finish(connections, &stopping, options.grace_period).await;
    if timeout(WORKERS_TIME_MAX, environment.end_workers()).await.is_err() {
        // They die with this process all the same.
        tracing::warn!("workers take long to end");
    }
    tracing::info!("stopped");
    Ok(())
}

fn daemon(
    options: &ServeOptions,
    environment: &Arc<Environment>,
    policies: &[Arc<Policy>],
) -> Daemon {
    let by_name: HashMap<_, _> = policies
        .iter()
        .map(|policy| (policy.spec.name.as_str().to_owned(), Arc::clone(policy)))
        .collect();
    Daemon::new(
        Arc::clone(environment),
        by_name,
        options.always_accept_admission_reviews_on_namespace.iter().cloned().collect(),
        AllowedPeers { uids: options.allow_uid.clone(), gids: options.allow_gid.clone() },
        options.max_body_bytes,
    )
}

/// Loads all policies side by side; says READY when each of them serves or can't.
async fn load_all(policies: Vec<Arc<Policy>>, environment: Arc<Environment>) {
    let mut loading = JoinSet::new();
    let total = policies.len();
    // Each holds its module in memory meanwhile.
    let places = Arc::new(Semaphore::new(startup::processors().saturating_mul(4)));
    for policy in policies {
        let (environment, places) = (Arc::clone(&environment), Arc::clone(&places));
        loading.spawn(async move {
            let _place = places.acquire().await;
            let name = policy.spec.name.as_str();
            let loaded = policy.load(&environment).await;
            match &loaded {
                Ok(()) => {
                    tracing::info!(policy = name, module = policy.spec.module_url, "policy serves");
                }
                Err(error) => {
                    let error = error.to_string();
                    tracing::error!(
                        policy = name,
                        module = policy.spec.module_url,
                        error = shorten(&error),
                        "policy can't serve"
                    );
                }
            }
            loaded.is_ok()
        });
    }
    let serving = loading.join_all().await.into_iter().filter(|serves| *serves).count();
    tracing::info!(serving, total, "all policies were tried");
    let status = format!("{serving} of {total} policies serve");
    notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// Tells the service manager; without one this does nothing.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "service manager can't be told");
    }
}

/// Accepts connections for ever.
async fn accept(
    socket: &Socket,
    daemon: &Arc<Daemon>,
    connections: &mut JoinSet<()>,
    stopped: &watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match socket.listener.accept().await {
            Ok((stream, _)) => {
                connections.spawn(connection(stream, Arc::clone(daemon), stopped.clone(), place));
            }
            Err(error) => {
                tracing::warn!(%error, "connection can't be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(
    stream: UnixStream,
    daemon: Arc<Daemon>,
    stopped: watch::Receiver<bool>,
    place: OwnedSemaphorePermit,
) {
    let credentials = match stream.peer_cred() {
        Ok(credentials) => credentials,
        Err(error) => {
            tracing::warn!(%error, "client without credentials is turned away");
            return;
        }
    };
    let peer = Peer {
        uid: credentials.uid(),
        gid: credentials.gid(),
        admitted: daemon.peers.admits(&credentials),
    };
    tracing::debug!(
        peer_uid = peer.uid,
        peer_gid = peer.gid,
        peer_pid = credentials.pid(),
        "client connected"
    );
    if !peer.admitted {
        tracing::warn!(peer_uid = peer.uid, peer_gid = peer.gid, "client is not on the list");
    }
    http::serve_connection(stream, daemon, peer, stopped).await;
    drop(place);
}

/// Gives connections the grace period to finish, then ends them.
async fn finish(mut connections: JoinSet<()>, stopping: &watch::Sender<bool>, grace: Duration) {
    stopping.send_replace(true);
    let all = async { while connections.join_next().await.is_some() {} };
    if timeout(grace, all).await.is_err() {
        tracing::warn!(unfinished = connections.len(), "grace period is over");
        connections.shutdown().await;
    }
}

/// What ends the daemon in order.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => tracing::info!("SIGTERM received"),
            _ = self.interrupt.recv() => tracing::info!("SIGINT received"),
        }
    }
}
