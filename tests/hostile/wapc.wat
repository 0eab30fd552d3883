;; A waPC policy that finds its settings valid and accepts everything, with two places for
;; hostile additions. Whatever runs at the second place, the request is accepted after it:
;; a host that lets the guest go on is found out.
(module
  (import "wapc" "__guest_request" (func $guest_request (param i32 i32)))
  (import "wapc" "__guest_response" (func $guest_response (param i32 i32)))
  (import "wapc" "__guest_error" (func $guest_error (param i32 i32)))
  (import "wapc" "__host_call"
    (func $host_call (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "wapc" "__host_response_len" (func $host_response_len (result i32)))
  (import "wapc" "__host_response" (func $host_response (param i32)))
  (import "wapc" "__host_error_len" (func $host_error_len (result i32)))
  (import "wapc" "__host_error" (func $host_error (param i32)))
  (import "wapc" "__console_log" (func $console_log (param i32 i32)))
  (import "wasi_snapshot_preview1" "fd_write"
    (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff"
    (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get"
    (func $clock_time_get (param i32 i64 i32) (result i32)))
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

  (func $accept (result i32)
    (call $guest_response (i32.const 32) (i32.const 17))
    (i32.const 1))

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

  (func (export "__guest_call") (param $operation i32) (param $payload i32) (result i32)
    (local $i i32)
    ;; "validate_settings"
    (if (i32.eq (local.get $operation) (i32.const 17))
      (then
        (call $guest_response (i32.const 16) (i32.const 14))
        (return (i32.const 1))))
    ;; CODE
    (call $accept)))
