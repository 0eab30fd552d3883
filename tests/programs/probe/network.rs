//! The network, and everything that sockets can do beside sending and receiving bytes.
#![forbid(unsafe_code)]

use libc::{
    AF_ALG, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_UNIX, AF_VSOCK, IPPROTO_ICMP,
    MSG_DONTWAIT, MSG_ERRQUEUE, MSG_OOB, MSG_PEEK, SCM_CREDENTIALS, SCM_RIGHTS, SHUT_RD,
    SO_PASSCRED, SO_RCVBUF, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM, SOL_SOCKET,
};

use super::kernel::{Gain, call};
use super::{
    Attempt, First, NO_DESCRIPTOR, Next, alone, capabilities, filtered, kernel, limits,
    network_namespace, refused,
};

const OWN_CHANNEL: &str = "changes, or asks about, the worker's own end of the channel";

/// What becomes of descriptors that are passed.
const DROPPED: Next = Next::Nothing(
    &["EPERM", "ETOOMANYREFS", "succeeded", "deadline"],
    "the supervisor takes none, or the kernel (before Linux 6.16) closes them on arrival",
);

fn socket(family: i32, kind: i32, protocol: i32) -> Gain {
    call!(libc::SYS_socket, family, kind, protocol)
}

fn connect(family: i32, kind: i32, address: &[u8]) -> Gain {
    let socket = socket(family, kind, 0)?;
    call!(libc::SYS_connect, socket, address.as_ptr(), address.len())
}

/// Port 80 of this machine, as the network writes it.
const HOME: [u8; 16] = [2, 0, 0, 80, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];

/// A line for the log with one piece of control data, in the layout of `struct msghdr`.
fn send_control(kind: i32, data: &[u32]) -> Gain {
    let line = super::resources::log(b"with control data");
    let part = [line.as_ptr().addr(), line.len()];
    let length = data.len().saturating_mul(4).saturating_add(16);
    let mut control = [0_u32; 16];
    for (place, word) in control.iter_mut().zip(
        [
            u32::try_from(length).unwrap_or_default(),
            0,
            SOL_SOCKET.cast_unsigned(),
            kind.cast_unsigned(),
        ]
        .iter()
        .chain(data),
    ) {
        *place = *word;
    }
    let message = [0, 0, part.as_ptr().addr(), 1, control.as_ptr().addr(), length, 0];
    call!(libc::SYS_sendmsg, 3, message.as_ptr(), 0)
}

/// Sends a byte to an abstract socket of somebody else.
fn send_to(address: &[u8]) -> Gain {
    call!(libc::SYS_sendto, 3, c"a", 1, MSG_DONTWAIT, address.as_ptr(), address.len())
}

fn receive(flags: i32) -> Gain {
    call!(libc::SYS_recvfrom, 3, [0_u8; 16].as_mut_ptr(), 16, flags | MSG_DONTWAIT, 0, 0)
}

pub(super) const ATTEMPTS: &[Attempt] = &[
    filtered(
        "network/tcp",
        "connects to a service of this machine",
        "socket",
        NO_DESCRIPTOR,
        || connect(AF_INET, SOCK_STREAM, &HOME),
    ),
    filtered("network/tcp-by-sendto", "connects by sending", "socket", NO_DESCRIPTOR, || {
        let socket = socket(AF_INET, SOCK_STREAM, 0)?;
        call!(libc::SYS_sendto, socket, c"a", 1, libc::MSG_FASTOPEN, HOME.as_ptr(), HOME.len())
    }),
    filtered("network/udp", "sends a datagram", "socket", NO_DESCRIPTOR, || {
        connect(AF_INET, SOCK_DGRAM, &HOME)
    }),
    filtered("network/ipv6", "makes a socket of IPv6", "socket", NO_DESCRIPTOR, || {
        socket(AF_INET6, SOCK_STREAM, 0)
    }),
    filtered("network/listen", "offers a service", "socket", NO_DESCRIPTOR, || {
        let socket = socket(AF_INET, SOCK_STREAM, 0)?;
        call!(libc::SYS_bind, socket, HOME.as_ptr(), HOME.len())?;
        call!(libc::SYS_listen, socket, 1)
    }),
    filtered("network/raw-icmp", "sends raw packets", "socket", kernel(&["EPERM"]), || {
        socket(AF_INET, SOCK_RAW, IPPROTO_ICMP)
    }),
    filtered("network/packet", "listens to the wire", "socket", kernel(&["EPERM"]), || {
        socket(AF_PACKET, SOCK_RAW, 768)
    }),
    filtered("network/netlink", "talks to the kernel's network", "socket", NO_DESCRIPTOR, || {
        socket(AF_NETLINK, SOCK_RAW, 0)
    }),
    filtered(
        "network/netlink-netfilter",
        "talks to the kernel's packet filter",
        "socket",
        NO_DESCRIPTOR,
        || socket(AF_NETLINK, SOCK_RAW, 12),
    ),
    filtered(
        "network/vsock",
        "talks to the hypervisor, past every namespace",
        "socket",
        NO_DESCRIPTOR,
        || socket(AF_VSOCK, SOCK_STREAM, 0),
    ),
    filtered(
        "network/alg",
        "uses the kernel's ciphers",
        "socket",
        limits(&["EMFILE", "EAFNOSUPPORT"]),
        || socket(AF_ALG, 5, 0),
    ),
    filtered("network/unix", "makes a local socket", "socket", NO_DESCRIPTOR, || {
        socket(AF_UNIX, SOCK_STREAM, 0)
    }),
    filtered(
        "network/unix-abstract",
        "connects to a local socket without a file",
        "socket",
        NO_DESCRIPTOR,
        || connect(AF_UNIX, SOCK_STREAM, b"\x01\0\0/tmp/.X11-unix/X0"),
    ),
    filtered(
        "network/unix-path",
        "connects to the container runtime",
        "socket",
        NO_DESCRIPTOR,
        || connect(AF_UNIX, SOCK_STREAM, b"\x01\0/run/containerd/containerd.sock\0"),
    ),
    filtered("network/socketpair", "makes a pair of sockets", "socketpair", NO_DESCRIPTOR, || {
        call!(libc::SYS_socketpair, AF_UNIX, SOCK_STREAM, 0, [0_i32; 2].as_mut_ptr())
    }),
    filtered(
        "network/accept",
        "accepts a connection on its channel",
        "accept4",
        limits(&["EMFILE"]),
        || call!(libc::SYS_accept4, 3, 0, 0, 0),
    ),
    filtered(
        "network/connect-channel",
        "connects its channel to another socket",
        "connect",
        network_namespace(&["ECONNREFUSED", "EISCONN"]),
        || {
            let address = b"\x01\0\0/tmp/.X11-unix/X0";
            call!(libc::SYS_connect, 3, address.as_ptr(), address.len())
        },
    ),
    filtered(
        "network/bind-channel",
        "gives its channel a name",
        "bind",
        alone("a name in the worker's own network namespace, where nobody else is"),
        || {
            let address = b"\x01\0\0conclave-red-team";
            call!(libc::SYS_bind, 3, address.as_ptr(), address.len())
        },
    ),
    filtered(
        "network/listen-channel",
        "listens on its channel",
        "listen",
        kernel(&["EINVAL"]),
        || call!(libc::SYS_listen, 3, 1),
    ),
    filtered(
        "network/pass-descriptor",
        "passes a descriptor to the supervisor",
        "sendmsg",
        DROPPED,
        || send_control(SCM_RIGHTS, &[4]),
    ),
    filtered(
        "network/pass-many",
        "passes descriptors until the kernel has no more room",
        "sendmsg",
        DROPPED,
        || send_control(SCM_RIGHTS, &[3, 3, 3, 3, 3, 3, 3, 3]),
    ),
    filtered(
        "network/lie-about-identity",
        "claims to be the supervisor",
        "sendmsg",
        capabilities(&["EPERM", "EINVAL", "ESRCH"]),
        || send_control(SCM_CREDENTIALS, &[super::processes::supervisor().cast_unsigned(), 0, 0]),
    ),
    filtered(
        "network/sendmmsg",
        "sends several messages at once",
        "sendmmsg",
        alone("sends bytes to the supervisor, as sendto does"),
        || {
            let line = super::resources::log(b"one of several");
            let part = [line.as_ptr().addr(), line.len()];
            let message = [0, 0, part.as_ptr().addr(), 1, 0, 0, 0, 0];
            call!(libc::SYS_sendmmsg, 3, message.as_ptr(), 1, 0)
        },
    ),
    filtered("network/recvmsg", "receives control data", "recvmsg", kernel(&["EAGAIN"]), || {
        let message = [0_usize; 7];
        call!(libc::SYS_recvmsg, 3, message.as_ptr(), MSG_DONTWAIT)
    }),
    filtered(
        "network/recvmmsg",
        "receives several messages at once",
        "recvmmsg",
        kernel(&["EAGAIN"]),
        || {
            let message = [0_usize; 8];
            call!(libc::SYS_recvmmsg, 3, message.as_ptr(), 1, MSG_DONTWAIT, 0)
        },
    ),
    filtered(
        "network/setsockopt",
        "changes an option of its channel",
        "setsockopt",
        alone(OWN_CHANNEL),
        || call!(libc::SYS_setsockopt, 3, SOL_SOCKET, SO_PASSCRED, [1_i32].as_ptr(), 4),
    ),
    filtered(
        "network/buffer",
        "has the kernel keep a large buffer",
        "setsockopt",
        alone(OWN_CHANNEL),
        || call!(libc::SYS_setsockopt, 3, SOL_SOCKET, SO_RCVBUF, [1_i32 << 30].as_ptr(), 4),
    ),
    filtered(
        "network/attach-filter",
        "puts a program of its own on its channel",
        "setsockopt",
        alone(OWN_CHANNEL),
        || {
            let program = [0x0006_u64 | (0xffff << 32)];
            let header = [1_usize, program.as_ptr().addr()];
            call!(libc::SYS_setsockopt, 3, SOL_SOCKET, 26, header.as_ptr(), 16)
        },
    ),
    filtered(
        "network/getsockopt",
        "asks who is at the other end",
        "getsockopt",
        alone(OWN_CHANNEL),
        || {
            call!(
                libc::SYS_getsockopt,
                3,
                SOL_SOCKET,
                17,
                [0_u32; 3].as_mut_ptr(),
                [12_u32].as_mut_ptr()
            )
        },
    ),
    filtered(
        "network/peer-descriptor",
        "asks for a descriptor of the supervisor's process",
        "getsockopt",
        NO_DESCRIPTOR,
        || {
            call!(
                libc::SYS_getsockopt,
                3,
                SOL_SOCKET,
                77,
                [0_i32].as_mut_ptr(),
                [4_u32].as_mut_ptr()
            )
        },
    ),
    filtered(
        "network/getsockname",
        "asks for the name of its channel",
        "getsockname",
        alone(OWN_CHANNEL),
        || call!(libc::SYS_getsockname, 3, [0_u8; 128].as_mut_ptr(), [128_u32].as_mut_ptr()),
    ),
    filtered(
        "network/shutdown",
        "closes one direction of its channel",
        "shutdown",
        alone(OWN_CHANNEL),
        || call!(libc::SYS_shutdown, 3, SHUT_RD),
    ),
    filtered(
        "network/writev",
        "writes to its channel by another call",
        "writev",
        alone(OWN_CHANNEL),
        || call!(libc::SYS_writev, 3, [0_usize; 2].as_ptr(), 0),
    ),
    filtered(
        "network/write",
        "writes to its channel by the file's call",
        "write",
        alone(OWN_CHANNEL),
        || call!(libc::SYS_write, 3, c"", 0),
    ),
    filtered(
        "network/read",
        "reads its channel by the file's call",
        "read",
        alone(OWN_CHANNEL),
        || call!(libc::SYS_read, 3, [0_u8; 1].as_mut_ptr(), 0),
    ),
    refused(
        "network/send-to-another",
        "sends to a socket that it names",
        First::Kernel(&["EISCONN", "EOPNOTSUPP"]),
        || send_to(b"\x01\0\0/tmp/.X11-unix/X0"),
    ),
    filtered(
        "network/out-of-band",
        "sends urgent data, whose code in the kernel had a hole",
        "sendto",
        Next::Nothing(
            &["succeeded", "deadline", "protocol"],
            "a byte to the supervisor, which reads none out of band",
        ),
        || call!(libc::SYS_sendto, 3, c"a", 1, MSG_OOB, 0, 0),
    ),
    filtered(
        "network/receive-out-of-band",
        "receives urgent data",
        "recvfrom",
        kernel(&["EINVAL", "EAGAIN"]),
        || receive(MSG_OOB),
    ),
    filtered(
        "network/peek",
        "looks at what waits without taking it",
        "recvfrom",
        kernel(&["EAGAIN"]),
        || receive(MSG_PEEK),
    ),
    filtered(
        "network/error-queue",
        "reads a queue of errors",
        "recvfrom",
        kernel(&["EAGAIN", "EINVAL"]),
        || receive(MSG_ERRQUEUE),
    ),
    refused(
        "network/send-from-nowhere",
        "has the kernel read where it may not",
        First::Kernel(&["EFAULT"]),
        || call!(libc::SYS_sendto, 3, 16, 4096, libc::MSG_NOSIGNAL, 0, 0),
    ),
    refused(
        "network/send-kernel-memory",
        "has the kernel send its own memory",
        First::Kernel(&["EFAULT"]),
        || call!(libc::SYS_sendto, 3, usize::MAX - (1 << 30), 4096, libc::MSG_NOSIGNAL, 0, 0),
    ),
    refused(
        "network/receive-into-kernel",
        "has the kernel receive into its own memory",
        First::Kernel(&["EFAULT"]),
        || call!(libc::SYS_recvfrom, 3, usize::MAX - (1 << 30), 4096, 0, 0, 0),
    ),
    refused(
        "network/send-by-image",
        "sends through its image",
        First::Kernel(&["ENOTSOCK"]),
        || call!(libc::SYS_sendto, 4, c"a", 1, libc::MSG_NOSIGNAL, 0, 0),
    ),
];
