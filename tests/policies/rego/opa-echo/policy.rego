# Does what the request says, so that tests can see what becomes of it.
package echo

# The request holds the whole result, or the response, or names one of the cases below.
main := input.request.result

main := {"response": input.request.response}

main := {"response": {"uid": "", "allowed": true, "warnings": [json.marshal(shown)]}}

shown := input if input.request.show == "input"

shown := data.settings if input.request.show == "data"

# Whether time stands still in one evaluation.
shown := time.now_ns() == time.now_ns() if input.request.show == "time"

# Two values for one rule: OPA's own error, which aborts.
shown := {1, 2} if input.request.show == "conflict"

shown := "conflict" if input.request.show == "conflict"

# A builtin that fails.
shown := "no failure" if {
	input.request.show == "failure"
	not hex.decode("no digits")
}

# Output for the log.
shown := trace("a note for the log") if input.request.show == "trace"
