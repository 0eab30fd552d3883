;; A policy like those that OPA compiles, which accepts everything, with two places for hostile
;; additions. Values are the addresses of their texts. Whatever runs at the second place, the
;; request is accepted after it: a host that lets the guest go on is found out.
(module
  (import "env" "opa_abort" (func $abort (param i32)))
  (import "env" "opa_println" (func $println (param i32)))
  (import "env" "opa_builtin0" (func $builtin0 (param i32 i32) (result i32)))
  (import "env" "opa_builtin1" (func $builtin1 (param i32 i32 i32) (result i32)))

  (memory (export "memory") 2)
  (global (export "opa_wasm_abi_version") i32 (i32.const 1))
  (global (export "opa_wasm_abi_minor_version") i32 (i32.const 3))
  (data (i32.const 16) "{\"time.now_ns\":0,\"trace\":1}\00")
  (data (i32.const 128) "{\"policy/main\":0}\00")
  (data (i32.const 256) "[{\"result\":{\"response\":{\"uid\":\"\",\"allowed\":true}}}]\00")

  ;; The values of the next calls of these functions.
  (global $malloc (mut i32) (i32.const 512))
  (global $parsed (mut i32) (i32.const 8))
  (global $result (mut i32) (i32.const 256))

  (func $recurse (param $depth i32) (result i32)
    (i32.add (i32.const 1) (call $recurse (i32.add (local.get $depth) (i32.const 1)))))

  ;; FIELDS

  (func (export "builtins") (result i32) (i32.const 16))
  (func (export "entrypoints") (result i32) (i32.const 128))
  (func (export "opa_malloc") (param i32) (result i32) (global.get $malloc))
  (func (export "opa_heap_ptr_get") (result i32) (i32.const 1024))
  (func (export "opa_heap_ptr_set") (param i32))
  (func (export "opa_json_parse") (param i32 i32) (result i32) (global.get $parsed))
  (func (export "opa_json_dump") (param i32) (result i32) (local.get 0))
  (func (export "opa_eval_ctx_new") (result i32) (i32.const 8))
  (func (export "opa_eval_ctx_set_input") (param i32 i32))
  (func (export "opa_eval_ctx_set_data") (param i32 i32))
  (func (export "opa_eval_ctx_set_entrypoint") (param i32 i32))
  (func (export "eval") (param i32) (result i32)
    (local $i i32)
    ;; CODE
    (i32.const 0))
  (func (export "opa_eval_ctx_get_result") (param i32) (result i32) (global.get $result)))
