//! Programs that read their request in all ways.

use crate::observed;
use crate::program::{Program, Verdict, hash, unless_bad};
use crate::scene::play_calmly;

/// A hash of the document, as `$read` gives it.
const READ: Verdict = Verdict::Says(|document| Ok(hash(document)));

/// What the host says on stdin when it is asked for what there is not.
const HOST_WORDS: &[u8] = b"unknown operation: none";

#[test]
fn every_request_reads_its_own_document_however_it_reads() {
    play_calmly(&[
        Program::wasi("at-once", "(call $say (call $read))", READ),
        Program::wasi(
            "late",
            "(local.set $i (i32.const 1000000))
             (loop $more (br_if $more (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))
             (call $say (call $read))",
            READ,
        ),
        Program::wasi("in-pieces", "(call $say (call $read_by (i32.const 7)))", READ),
        Program::wasi("byte-by-byte", "(call $say (call $read_by (i32.const 1)))", READ),
        Program::wasi(
            "nothing-first",
            "(if (call $read_some (i32.const 65536) (i32.const 0)) (then (unreachable)))
             (call $say (call $read))",
            READ,
        )
        .perhaps_kept(),
        // The end is the end, however often it is read.
        Program::wasi(
            "twice",
            "(local.set $x (call $read))
             (if (i64.ne (call $read) (i64.const 0xcbf29ce484222325)) (then (unreachable)))
             (call $say (local.get $x))",
            READ,
        ),
        Program::wasi("returns", "(call $say (call $read)) (call $answer) (return)", READ),
        // A document that is not read to its end is no beginning of the next one.
        Program::wasi(
            "a-part",
            "(call $say (call $hash (i32.const 65536)
               (i32.add (i32.const 65536) (call $read_some (i32.const 65536) (i32.const 14)))))",
            Verdict::Says(|document| Ok(hash(&document[..14]))),
        ),
    ]);
}

#[test]
fn a_command_that_does_not_import_proc_exit_answers_by_returning() {
    play_calmly(&[Program::wasi_without_exit("returns", "(call $say (call $read))", READ)
        .not_kept("does not import proc_exit")]);
}

#[test]
fn a_program_may_wait_before_it_reads() {
    play_calmly(&[
        Program::wasi(
            "sleeps",
            "(call $poll (i32.const 160)) (call $say (call $read)) (call $poll (i32.const 160))",
            READ,
        ),
        Program::wasi(
            "waits-for-stdin",
            "(call $poll (i32.const 208)) (call $say (call $read))",
            READ,
        )
        .perhaps_kept(),
        // It is told how much there is to read: of this request, not of another.
        Program::wasi(
            "says-how-much-waits",
            "(call $poll (i32.const 208)) (call $say (i64.load (i32.const 272)))",
            Verdict::Says(|document| Ok(u64::try_from(document.len()).unwrap())),
        )
        .perhaps_kept(),
        Program::wasi(
            "waits-between-reads",
            "(drop (call $read_some (i32.const 65536) (i32.const 10)))
             (call $poll (i32.const 208))
             (call $say (i64.load (i32.const 272)))",
            Verdict::Says(|document| Ok(u64::try_from(document.len() - 10).unwrap())),
        ),
    ]);
}

#[test]
fn what_a_program_does_before_it_reads_is_done_for_every_request() {
    let print = |descriptor, length| {
        format!("(call $print (i32.const {descriptor}) (i32.const 110) (i32.const {length}))")
    };
    play_calmly(&[
        Program::wasi("never-reads", "(call $say (i64.const 7))", Verdict::Says(|_| Ok(7)))
            .not_kept(observed::OUTPUT),
        Program::wasi(
            "never-reads-and-is-silent",
            "(call $proc_exit (i32.const 0))",
            Verdict::Says(|_| Err("Cannot deserialize policy validation response")),
        )
        .not_kept(observed::EXIT),
        Program::wasi("gives-up", "(call $proc_exit (i32.const 3))", Verdict::Says(|_| Err("")))
            .not_kept(observed::EXIT),
        // Two null bytes before an answer make it none.
        Program::wasi(
            "writes-to-stdout-first",
            &(print(1, 2) + "(call $say (call $read))"),
            Verdict::Says(|_| Err("Cannot deserialize policy validation response")),
        )
        .not_kept(observed::OUTPUT),
        Program::wasi("writes-to-stderr-first", &(print(2, 2) + "(call $say (call $read))"), READ)
            .not_kept(observed::OUTPUT),
        Program::wasi(
            "asks-the-host-first",
            "(if (i32.eqz (call $ask_host)) (then (unreachable))) (call $say (call $read))",
            // The host's words follow the document.
            Verdict::Says(|document| Ok(hash(&[document, HOST_WORDS].concat()))),
        )
        .not_kept(observed::HOST_CALL),
    ]);
}

#[test]
fn stdin_has_the_answers_of_the_host_and_they_are_gone_with_the_request() {
    const DOCUMENT_AND_WORDS: Verdict =
        Verdict::Says(|document| Ok(hash(document) ^ hash(HOST_WORDS)));
    play_calmly(&[
        Program::wasi(
            "host",
            "(local.set $x (call $read))
             (if (i32.eqz (call $ask_host)) (then (unreachable)))
             (call $say (i64.xor (local.get $x) (call $read)))",
            DOCUMENT_AND_WORDS,
        ),
        Program::wasi(
            "javy-host",
            "(local.set $x (call $read))
             (if (i32.eqz (call $ask_javy_host)) (then (unreachable)))
             (call $say (i64.xor (local.get $x) (call $read)))",
            DOCUMENT_AND_WORDS,
        ),
        Program::wasi(
            "both-hosts",
            "(local.set $x (call $read))
             (drop (call $ask_host))
             (local.set $y (call $read))
             (drop (call $ask_javy_host))
             (call $say (i64.add (i64.xor (local.get $x) (local.get $y)) (call $read)))",
            Verdict::Says(|document| {
                Ok((hash(document) ^ hash(HOST_WORDS)).wrapping_add(hash(HOST_WORDS)))
            }),
        ),
        Program::wasi(
            "does-not-listen",
            "(call $say (call $read)) (drop (call $ask_host)) (drop (call $ask_host))",
            READ,
        ),
    ]);
}

#[test]
fn output_of_a_request_that_failed_is_gone_with_it() {
    let failing = |name, print: &str| {
        Program::wasi(
            name,
            &format!(
                "(call $say (call $read))
                 (if (call $is_bad) (then {print} (call $proc_exit (i32.const 1))))"
            ),
            Verdict::Says(|document| unless_bad(document, "")),
        )
    };
    play_calmly(&[
        failing("silent", ""),
        failing("half-an-answer", "(call $print (i32.const 1) (i32.const 64) (i32.const 20))"),
        failing("whole-answer", "(call $answer)"),
        failing("complains", "(call $print (i32.const 2) (i32.const 64) (i32.const 20))"),
    ]);
}
