;; A WASI policy that finds its settings valid and accepts everything, with two places for
;; hostile additions. Whatever runs at the second place, the request is accepted after it:
;; a host that lets the guest go on is found out.
(module
  (import "host" "call"
    (func $host_call (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get"
    (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read"
    (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write"
    (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff"
    (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))

  (memory (export "memory") 2)
  (data (i32.const 16) "{\"valid\":true}")
  (data (i32.const 32) "{\"accepted\":true}")
  (data (i32.const 64) "kubewarden")
  (data (i32.const 80) "tracing")
  (data (i32.const 96) "log")
  (data (i32.const 104) "lag")
  ;; 112: a poll_oneoff subscription of the monotonic clock, for one hour.
  (data (i32.const 128) "\01")
  (data (i32.const 136) "\00\a0\b8\30\46\03\00\00")

  (func $accept
    (call $print (i32.const 1) (i32.const 32) (i32.const 17)))

  (func $log (param $pointer i32) (param $length i32) (result i32)
    (call $host_call
      (i32.const 64) (i32.const 10) (i32.const 80) (i32.const 7) (i32.const 96) (i32.const 3)
      (local.get $pointer) (local.get $length)))

  ;; There is no such operation, and nothing is logged about it.
  (func $call (param $pointer i32) (param $length i32) (result i32)
    (call $host_call
      (i32.const 64) (i32.const 10) (i32.const 80) (i32.const 7) (i32.const 104) (i32.const 3)
      (local.get $pointer) (local.get $length)))

  (func $print (param $descriptor i32) (param $pointer i32) (param $length i32)
    (i32.store (i32.const 0) (local.get $pointer))
    (i32.store (i32.const 4) (local.get $length))
    (drop (call $fd_write (local.get $descriptor) (i32.const 0) (i32.const 1) (i32.const 8))))

  (func $sleep_for_an_hour
    (drop (call $poll_oneoff (i32.const 112) (i32.const 512) (i32.const 1) (i32.const 1024))))

  (func $recurse (param $depth i32) (result i32)
    (i32.add (i32.const 1) (call $recurse (i32.add (local.get $depth) (i32.const 1)))))

  ;; FIELDS

  (func (export "_start")
    (local $i i32)
    ;; "policy.wasm" and "validate-settings", each with its null byte.
    (drop (call $args_sizes_get (i32.const 0) (i32.const 4)))
    (if (i32.eq (i32.load (i32.const 4)) (i32.const 30))
      (then
        (call $print (i32.const 1) (i32.const 16) (i32.const 14))
        (return)))
    ;; CODE
    (call $accept)))
