// A validating policy with the waPC contract, by Go's official compiler, that takes about
// 100 ms to begin: its package variables are regular expressions and tables. It refuses pods
// whose images have no tag or digest that its expressions accept.
package main

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unsafe"
)

//go:wasmimport wapc __guest_request
func guestRequest(operation, payload unsafe.Pointer)

//go:wasmimport wapc __guest_response
func guestResponse(pointer unsafe.Pointer, length uint32)

//go:wasmimport wapc __guest_error
func guestError(pointer unsafe.Pointer, length uint32)

var (
	registries = compileRegistries()
	words      = fillWords()
)

func compileRegistries() []*regexp.Regexp {
	var compiled []*regexp.Regexp
	for index := range 360 {
		compiled = append(compiled, regexp.MustCompile(fmt.Sprintf(
			`(?i)^(?:[\pL\d]{1,20}\.){0,3}example-%d\.[\p{Greek}\p{Latin}]{2,10}/`, index)))
	}
	return compiled
}

func fillWords() map[string]int {
	table := make(map[string]int)
	for index := range 60_000 {
		table[fmt.Sprintf("word-%d", index)] = index
	}
	return table
}

type payload struct {
	Request struct {
		Object *struct {
			Spec struct {
				Containers []struct {
					Image string `json:"image"`
				} `json:"containers"`
			} `json:"spec"`
		} `json:"object"`
	} `json:"request"`
}

//go:wasmexport __guest_call
func guestCall(operationLength, payloadLength uint32) uint32 {
	// One more, so that there is a first byte to point at.
	operation := make([]byte, operationLength+1)
	document := make([]byte, payloadLength+1)
	guestRequest(unsafe.Pointer(&operation[0]), unsafe.Pointer(&document[0]))
	answer, err := handle(string(operation[:operationLength]), document[:payloadLength])
	if err != nil {
		text := []byte(err.Error())
		guestError(unsafe.Pointer(&text[0]), uint32(len(text)))
		return 0
	}
	guestResponse(unsafe.Pointer(&answer[0]), uint32(len(answer)))
	return 1
}

func handle(operation string, document []byte) ([]byte, error) {
	switch operation {
	case "protocol_version":
		return []byte(`"v1"`), nil
	case "validate_settings":
		return []byte(`{"valid":true}`), nil
	case "validate":
		return validate(document)
	default:
		return nil, fmt.Errorf("unknown operation %q", operation)
	}
}

func validate(document []byte) ([]byte, error) {
	var in payload
	if err := json.Unmarshal(document, &in); err != nil {
		return nil, fmt.Errorf("cannot read the request: %w", err)
	}
	if in.Request.Object == nil {
		return []byte(`{"accepted":true}`), nil
	}
	var refused []string
	for _, container := range in.Request.Object.Spec.Containers {
		_, isWord := words[container.Image]
		isListed := slices.ContainsFunc(registries, func(registry *regexp.Regexp) bool {
			return registry.MatchString(container.Image)
		})
		if isWord || isListed {
			refused = append(refused, container.Image)
		}
	}
	if len(refused) == 0 {
		return []byte(`{"accepted":true}`), nil
	}
	return json.Marshal(map[string]any{
		"accepted": false,
		"message":  "images that are not to be used: " + strings.Join(refused, ", "),
	})
}

func main() {}
