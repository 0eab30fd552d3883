;; A waPC policy that finds its settings valid, accepts every request, and says one number
;; about it, with three places to fill.
;;
;;      0  a vector for writing, and how much was
;;     32  answers
;;    112  names for host calls
;;    384  a counter
;;    512  the operation
;;  65536  the request
(module
  (import "wapc" "__guest_request" (func $guest_request (param i32 i32)))
  (import "wapc" "__guest_response" (func $guest_response (param i32 i32)))
  (import "wapc" "__guest_error" (func $guest_error (param i32 i32)))
  (import "wapc" "__host_call"
    (func $host_call (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "wapc" "__host_response_len" (func $host_response_len (result i32)))
  (import "wapc" "__host_error_len" (func $host_error_len (result i32)))
  (import "wapc" "__console_log" (func $console_log (param i32 i32)))
  (import "wasi_snapshot_preview1" "clock_time_get"
    (func $clock_time_get (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write"
    (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get"
    (func $random_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))

  (memory (export "memory") 2)
  (data (i32.const 32) "{\"valid\":true}")
  (data (i32.const 64) "{\"accepted\":true,\"message\":\"0000000000000000\"}")
  (data (i32.const 112) "kubewarden")
  (data (i32.const 128) "tracing")
  (data (i32.const 136) "none")

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

  ;; Whether the request asks for trouble: it is a text that begins with "!".
  (func $is_bad (result i32)
    (i32.eq (i32.load8_u (i32.const 65548)) (i32.const 33)))

  ;; Whether the request is a text: those for practice are not.
  (func $is_text (result i32)
    (i32.eq (i32.load8_u (i32.const 65547)) (i32.const 34)))

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

  ;; There is no such operation.
  (func $ask_host (result i32)
    (call $host_call
      (i32.const 112) (i32.const 10) (i32.const 128) (i32.const 7) (i32.const 136) (i32.const 4)
      (i32.const 0) (i32.const 0)))

  (func $random (result i64)
    (drop (call $random_get (i32.const 392) (i32.const 8)))
    (i64.load (i32.const 392)))

  (func $now (param $clock i32) (result i64)
    (drop (call $clock_time_get (local.get $clock) (i64.const 1) (i32.const 392)))
    (i64.load (i32.const 392)))

  ;; FIELDS

  (func (export "wapc_init")
    ;; INIT
  )

  (func (export "__guest_call") (param $operation i32) (param $length i32) (result i32)
    (local $i i32) (local $request i64)
    ;; "validate_settings"
    (if (i32.eq (local.get $operation) (i32.const 17))
      (then
        (call $guest_response (i32.const 32) (i32.const 14))
        (return (i32.const 1))))
    ;; What lies there before anything is read.
    (i64.store (i32.const 400) (call $hash (i32.const 65536) (i32.const 131072)))
    (call $guest_request (i32.const 512) (i32.const 65536))
    (local.set $request
      (call $hash (i32.const 65536) (i32.add (i32.const 65536) (local.get $length))))
    ;; CODE
    (call $guest_response (i32.const 64) (i32.const 46))
    (i32.const 1)))
