//! Programs that try to remember: whatever a request changes, the next one finds as it was.

use std::fmt::Write as _;

use crate::program::{Program, Verdict, hash};
use crate::scene::play_calmly;

#[test]
fn globals_are_for_one_request() {
    play_calmly(&[
        Program::wasi_with(
            "integers",
            "(global $narrow (mut i32) (i32.const 100)) (global $wide (mut i64) (i64.const 200))",
            "(global.set $narrow (i32.add (global.get $narrow) (i32.const 1)))
             (global.set $wide (i64.add (global.get $wide) (i64.const 1)))
             (drop (call $read))
             (global.set $narrow (i32.add (global.get $narrow) (i32.const 1)))
             (global.set $wide (i64.add (global.get $wide) (i64.const 1)))
             (call $say (i64.mul (global.get $wide) (i64.extend_i32_u (global.get $narrow))))",
            Verdict::Says(|_| Ok(202 * 102)),
        ),
        Program::wasi_with(
            "floats",
            "(global $narrow (mut f32) (f32.const 0.5))
             (global $wide (mut f64) (f64.const nan:0x1234))",
            "(drop (call $read))
             (call $say (i64.xor (i64.reinterpret_f64 (global.get $wide))
               (i64.extend_i32_u (i32.reinterpret_f32 (global.get $narrow)))))
             (global.set $narrow (f32.add (global.get $narrow) (f32.const 1)))
             (global.set $wide (f64.const 2))",
            Verdict::Says(|_| Ok(0x7ff0_0000_0000_1234 ^ u64::from(0.5_f32.to_bits()))),
        ),
        Program::wasi_with(
            "vectors",
            "(global $vector (mut v128) (v128.const i64x2 5 6))",
            "(drop (call $read))
             (global.set $vector (i64x2.add (global.get $vector) (v128.const i64x2 1 1)))
             (call $say (i64x2.extract_lane 1 (global.get $vector)))",
            Verdict::Says(|_| Ok(7)),
        )
        .perhaps_kept(),
        Program::wasi_with(
            "exported",
            r#"(global $count (export "count") (mut i64) (i64.const 1))"#,
            "(drop (call $read))
             (global.set $count (i64.add (global.get $count) (i64.const 1)))
             (call $say (global.get $count))",
            Verdict::Says(|_| Ok(2)),
        ),
        Program::wasi_with(
            "set-by-the-start-section",
            "(global $count (mut i64) (i64.const 1))
             (func $begin (global.set $count (i64.const 40)))
             (start $begin)",
            "(drop (call $read))
             (global.set $count (i64.add (global.get $count) (i64.const 2)))
             (call $say (global.get $count))",
            Verdict::Says(|_| Ok(42)),
        ),
    ]);
}

#[test]
fn as_many_globals_as_there_may_be_are_for_one_request() {
    let many = |count: usize| {
        let globals: String = (0..count).fold(String::new(), |mut text, index| {
            writeln!(text, "(global $g{index} (mut i64) (i64.const {index}))").unwrap();
            text
        });
        let sum: String = (0..count).fold("(drop (call $read))".to_owned(), |mut text, index| {
            writeln!(
                text,
                "(global.set $g{index} (i64.add (global.get $g{index}) (i64.const 1)))
                 (local.set $x (i64.add (local.get $x) (global.get $g{index})))"
            )
            .unwrap();
            text
        });
        (globals, sum + "(call $say (local.get $x))")
    };
    let (most, sum_of_most) = many(256);
    let (more, sum_of_more) = many(257);
    play_calmly(&[
        Program::wasi_with("most", &most, &sum_of_most, Verdict::Says(|_| Ok(256 * 257 / 2))),
        Program::wasi_with("more", &more, &sum_of_more, Verdict::Says(|_| Ok(257 * 258 / 2)))
            .not_kept("too many"),
    ]);
}

/// Adds one to what lies at an address.
fn count(at: u32) -> String {
    format!("(i64.store (i32.const {at}) (i64.add (i64.load (i32.const {at})) (i64.const 1)))")
}

#[test]
fn memory_is_for_one_request() {
    let counting = |before: &[u32], after: &[u32]| {
        let before: String = before.iter().map(|at| count(*at)).collect();
        let sum: String = after
            .iter()
            .map(|at| {
                format!(
                    "{} (local.set $x (i64.add (local.get $x) (i64.load (i32.const {at}))))",
                    count(*at)
                )
            })
            .collect();
        before + "(drop (call $read))" + &sum + "(call $say (local.get $x))"
    };
    play_calmly(&[
        Program::wasi("low", &counting(&[384], &[384]), Verdict::Says(|_| Ok(2))),
        Program::wasi("after-only", &counting(&[], &[384]), Verdict::Says(|_| Ok(1))),
        // Pages that nobody touched before, across a boundary, and the last bytes.
        Program::wasi(
            "untouched",
            &counting(&[], &[110_592, 114_684, 131_064]),
            Verdict::Says(|_| Ok(3)),
        ),
        Program::wasi(
            "touched",
            &counting(&[110_592, 114_684, 131_064], &[110_592, 114_684, 131_064]),
            Verdict::Says(|_| Ok(6)),
        ),
        // What the longest request left in the buffer.
        Program::wasi(
            "buffer",
            "(call $say (i64.xor (call $read) (call $hash (i32.const 102400) (i32.const 131072))))
             (memory.fill (i32.const 102400) (i32.const 170) (i32.const 28672))",
            Verdict::Says(|document| Ok(hash(document) ^ hash(&[0; 28672]))),
        ),
        Program::wasi(
            "wiped",
            "(drop (call $read))
             (call $say (i64.load (i32.const 112)))
             (memory.fill (i32.const 112) (i32.const 0) (i32.const 16))",
            Verdict::Says(|_| Ok(u64::from_le_bytes(*b"kubeward"))),
        ),
        Program::wasi_with(
            "initialised-anew",
            "(data $words \"12345678\")",
            "(drop (call $read))
             (call $say (i64.load (i32.const 110592)))
             (memory.init $words (i32.const 110592) (i32.const 0) (i32.const 8))",
            Verdict::Says(|_| Ok(0)),
        ),
    ]);
}

#[test]
fn memory_that_has_grown_for_a_request_is_gone_after_it() {
    let grow = |pages: u32| {
        format!(
            "(if (i32.eq (memory.grow (i32.const {pages})) (i32.const -1)) (then (unreachable)))"
        )
    };
    // The size, and what lies at the end once it has grown by so many pages.
    let look_and_grow = |pages: u32| {
        format!(
            "(local.set $x (i64.shl (i64.extend_i32_u (memory.size)) (i64.const 32)))
             {}
             (local.set $i (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 8)))
             (call $say (i64.or (local.get $x) (i64.load (local.get $i))))
             (i64.store (local.get $i) (i64.const 99))",
            grow(pages)
        )
    };
    play_calmly(&[
        Program::wasi(
            "after",
            &format!("(drop (call $read)) {}", look_and_grow(10)),
            Verdict::Says(|_| Ok(2 << 32)),
        ),
        Program::wasi(
            "before-and-after",
            &format!(
                "{} (i64.store (i32.const 327672) (i64.const 5))
                 (drop (call $read))
                 {} (i64.store (i32.const 327672) (i64.const 6))",
                grow(3),
                look_and_grow(10)
            ),
            Verdict::Says(|_| Ok(5 << 32)),
        ),
        Program::wasi(
            "before",
            &format!(
                "{} (i64.store (i32.const 327672) (i64.const 5))
                 (drop (call $read))
                 (call $say (i64.load (i32.const 327672)))
                 (i64.store (i32.const 327672) (i64.const 6))",
                grow(3)
            ),
            Verdict::Says(|_| Ok(5)),
        ),
        // Every page of the new memory is written to, and there is much of it.
        Program::wasi(
            "much",
            &format!(
                "(drop (call $read)) {}
                 (local.set $i (i32.const 131072))
                 (loop $more
                   (local.set $x (i64.or (local.get $x) (i64.load (local.get $i))))
                   (i64.store (local.get $i) (i64.const -1))
                   (local.set $i (i32.add (local.get $i) (i32.const 4096)))
                   (br_if $more (i32.lt_u (local.get $i) (i32.const 67239936))))
                 (call $say (local.get $x))",
                grow(1024)
            ),
            Verdict::Says(|_| Ok(0)),
        ),
    ]);
}

/// The number of a depth, which calls itself and reads at the bottom.
const READ_BELOW: &str = "(func $read_below (param $depth i64) (result i64)
    (local $kept i64)
    (local.set $kept (i64.mul (local.get $depth) (i64.const 3)))
    (if (i64.eqz (local.get $depth))
      (then (drop (call $read)))
      (else (local.set $kept
        (i64.add (local.get $kept)
          (call $read_below (i64.sub (local.get $depth) (i64.const 1)))))))
    (local.get $kept))";

#[test]
fn the_stack_is_as_it_was_when_the_program_read() {
    play_calmly(&[
        Program::wasi(
            "locals",
            "(local.set $x (i64.const 5)) (local.set $i (i32.const 6))
             (drop (call $read))
             (local.set $x (i64.add (local.get $x) (i64.const 1)))
             (local.set $i (i32.mul (local.get $i) (local.get $i)))
             (call $say (i64.mul (local.get $x) (i64.extend_i32_u (local.get $i))))",
            Verdict::Says(|_| Ok(6 * 36)),
        ),
        Program::wasi_with(
            "many-values",
            "(func $twice (param f64) (result f64) (f64.add (local.get 0) (local.get 0)))",
            "(call $say (i64.trunc_f64_s
               (f64.add (call $twice (f64.const 1)) (f64.add (call $twice (f64.const 2))
               (f64.add (call $twice (f64.const 4)) (f64.add (call $twice (f64.const 8))
               (f64.add (call $twice (f64.const 16)) (f64.mul (f64.const 0)
                 (f64.convert_i64_u (i64.and (call $read) (i64.const 1)))))))))))",
            Verdict::Says(|_| Ok(62)),
        ),
        Program::wasi_with(
            "reads-deep-below",
            READ_BELOW,
            "(call $say (call $read_below (i64.const 1000)))",
            Verdict::Says(|_| Ok(3 * 1000 * 1001 / 2)),
        ),
        Program::wasi(
            "dives-before",
            "(local.set $x (call $dive (i64.const 3000)))
             (drop (call $read))
             (call $say (local.get $x))",
            Verdict::Says(|_| Ok(3000)),
        ),
        Program::wasi(
            "dives-after",
            "(drop (call $read)) (call $say (call $dive (i64.const 3000)))",
            Verdict::Says(|_| Ok(3000)),
        ),
    ]);
}

#[test]
fn what_is_neither_memory_nor_a_number_is_not_kept_but_made_anew() {
    let table = |name, fields: &str, code: &str| {
        let code = format!("(drop (call $read)) {code}");
        Program::wasi_with(name, fields, &code, Verdict::Says(|_| Ok(1)))
    };
    let is_null = "(call $say (i64.extend_i32_u (ref.is_null (table.get $table (i32.const 0)))))";
    let fields = "(table $table 2 10 funcref) (elem declare func $answer)";
    let segment = "(table $table 2 10 funcref) (elem $segment funcref (ref.func $answer))";
    play_calmly(&[
        // A table that nobody changes is no obstacle.
        table("table-get", fields, is_null),
        table(
            "table-set",
            fields,
            &format!("{is_null} (table.set $table (i32.const 0) (ref.func $answer))"),
        )
        .not_kept("change a table"),
        table(
            "table-fill",
            fields,
            &format!(
                "{is_null} (table.fill $table (i32.const 0) (ref.func $answer) (i32.const 2))"
            ),
        )
        .not_kept("change a table"),
        table(
            "table-grow",
            fields,
            "(call $say (i64.extend_i32_u (i32.sub (table.size $table) (i32.const 1))))
             (drop (table.grow $table (ref.null func) (i32.const 1)))",
        )
        .not_kept("change a table"),
        table(
            "table-init",
            segment,
            &format!(
                "{is_null} (table.init $table $segment (i32.const 0) (i32.const 0) (i32.const 1))"
            ),
        )
        .not_kept("change a table"),
        table(
            "table-copy",
            "(table $table 2 10 funcref) (table $other funcref (elem $answer))",
            &format!(
                "{is_null} (table.copy $table $other (i32.const 0) (i32.const 0) (i32.const 1))"
            ),
        )
        .not_kept("change a table"),
        table("elem-drop", segment, "(elem.drop $segment) (call $say (i64.const 1))")
            .not_kept("drop a segment"),
        table(
            "data-drop",
            "(data $words \"\\01\\00\\00\\00\\00\\00\\00\\00\")",
            // Where it is dropped already, this traps.
            "(memory.init $words (i32.const 110592) (i32.const 0) (i32.const 8))
             (data.drop $words)
             (call $say (i64.load (i32.const 110592)))",
        )
        .not_kept("drop a segment"),
        table(
            "reference",
            "(global $reference (mut funcref) (ref.null func)) (elem declare func $answer)",
            "(call $say (i64.extend_i32_u (ref.is_null (global.get $reference))))
             (global.set $reference (ref.func $answer))",
        )
        .not_kept("a mutable global holds a reference"),
        table("name", r#"(func (export "conclave:global/0"))"#, "(call $say (i64.const 1))")
            .not_kept("begins with"),
    ]);
}
