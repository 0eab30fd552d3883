;; A WASI policy that finds its settings valid, accepts every request, and says one number
;; about it, with two places to fill. It reads only where the filling says so.
;;
;;      0  a vector for reading and writing, and how much was
;;     16  sizes of the arguments
;;     32  answers
;;    112  names for host calls
;;    160  what to poll: a clock, then stdin
;;    256  events
;;    384  a counter
;;  65536  what was read
(module
  (import "host" "call"
    (func $host_call (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "kubewarden:javy/host" "call"
    (func $javy_host_call (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get"
    (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get"
    (func $clock_time_get (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read"
    (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write"
    (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff"
    (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get"
    (func $random_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))

  (memory (export "memory") 2)
  (data (i32.const 32) "{\"valid\":true}")
  (data (i32.const 64) "{\"accepted\":true,\"message\":\"0000000000000000\"}")
  (data (i32.const 112) "kubewarden")
  (data (i32.const 128) "tracing")
  (data (i32.const 136) "none")
  ;; The monotonic clock, in 20 ms.
  (data (i32.const 176) "\01")
  (data (i32.const 184) "\00\2d\31\01")
  (data (i32.const 216) "\01")

  ;; One read of at most that many bytes; how many there were.
  (func $read_some (param $at i32) (param $most i32) (result i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $most))
    (if (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8))
      (then (unreachable)))
    (i32.load (i32.const 8)))

  ;; Reads to the end, so many bytes at a time; a hash of all that there was.
  (func $read_by (param $most i32) (result i64)
    (local $end i32) (local $read i32)
    (local.set $end (i32.const 65536))
    (loop $more
      (local.set $read (call $read_some (local.get $end) (local.get $most)))
      (local.set $end (i32.add (local.get $end) (local.get $read)))
      (br_if $more (local.get $read)))
    (call $hash (i32.const 65536) (local.get $end)))

  (func $read (result i64)
    (call $read_by (i32.const 4096)))

  ;; FNV-1a.
  (func $hash (param $at i32) (param $end i32) (result i64)
    (local $hash i64)
    (local.set $hash (i64.const 0xcbf29ce484222325))
    (block $done
      (loop $more
        (br_if $done (i32.ge_u (local.get $at) (local.get $end)))
        (local.set $hash
          (i64.mul (i64.xor (local.get $hash) (i64.load8_u (local.get $at)))
            (i64.const 0x100000001b3)))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $more)))
    (local.get $hash))

  ;; Whether the request that was read asks for trouble: it is a text that begins with "!".
  (func $is_bad (result i32)
    (i32.eq (i32.load8_u (i32.const 65548)) (i32.const 33)))

  ;; Puts the number into the answer.
  (func $say (param $number i64)
    (local $at i32) (local $digit i32)
    (local.set $at (i32.const 107))
    (loop $more
      (local.set $digit (i32.wrap_i64 (i64.and (local.get $number) (i64.const 15))))
      (i32.store8 (local.get $at)
        (i32.add (local.get $digit)
          (select (i32.const 48) (i32.const 87) (i32.lt_u (local.get $digit) (i32.const 10)))))
      (local.set $number (i64.shr_u (local.get $number) (i64.const 4)))
      (local.set $at (i32.sub (local.get $at) (i32.const 1)))
      (br_if $more (i32.ge_u (local.get $at) (i32.const 92)))))

  (func $print (param $descriptor i32) (param $pointer i32) (param $length i32)
    (i32.store (i32.const 0) (local.get $pointer))
    (i32.store (i32.const 4) (local.get $length))
    (drop (call $fd_write (local.get $descriptor) (i32.const 0) (i32.const 1) (i32.const 8))))

  (func $answer
    (call $print (i32.const 1) (i32.const 64) (i32.const 46)))

  ;; There is no such operation, and the host says so on stdin.
  (func $ask_host (result i32)
    (call $host_call
      (i32.const 112) (i32.const 10) (i32.const 128) (i32.const 7) (i32.const 136) (i32.const 4)
      (i32.const 0) (i32.const 0)))

  (func $ask_javy_host (result i32)
    (call $javy_host_call
      (i32.const 112) (i32.const 10) (i32.const 128) (i32.const 7) (i32.const 136) (i32.const 4)
      (i32.const 0) (i32.const 0)))

  ;; Waits for the clock or stdin: the address of what to poll.
  (func $poll (param $subscription i32)
    (if (call $poll_oneoff
          (local.get $subscription) (i32.const 256) (i32.const 1) (i32.const 8))
      (then (unreachable))))

  (func $random (result i64)
    (drop (call $random_get (i32.const 392) (i32.const 8)))
    (i64.load (i32.const 392)))

  (func $now (param $clock i32) (result i64)
    (drop (call $clock_time_get (local.get $clock) (i64.const 1) (i32.const 392)))
    (i64.load (i32.const 392)))

  ;; Calls itself that many times, and counts.
  (func $dive (param $depth i64) (result i64)
    (if (result i64) (i64.eqz (local.get $depth))
      (then (i64.const 0))
      (else
        (i64.add (i64.const 1) (call $dive (i64.sub (local.get $depth) (i64.const 1)))))))

  ;; FIELDS

  (func (export "_start")
    (local $i i32) (local $x i64) (local $y i64)
    ;; "policy.wasm" and "validate-settings", each with its null byte.
    (drop (call $args_sizes_get (i32.const 16) (i32.const 20)))
    (if (i32.eq (i32.load (i32.const 20)) (i32.const 30))
      (then
        (call $print (i32.const 1) (i32.const 32) (i32.const 14))
        (call $proc_exit (i32.const 0))))
    ;; CODE
    (call $answer)
    (call $proc_exit (i32.const 0))))
