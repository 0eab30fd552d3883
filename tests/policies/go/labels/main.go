// A validating policy with the WASI contract: the verb is the first argument, the
// request comes on standard input and the answer leaves on standard output.
//
// It requires labels on objects and checks label values against regular expressions.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
)

// An object with this annotation set to "true" makes the policy write a line to
// standard error besides deciding.
const debugAnnotation = "conclave.example/debug"

type settings struct {
	// Labels that an object must have.
	Required []string `json:"required"`
	// What the whole value of a label must match, if the object has the label.
	Patterns map[string]string `json:"patterns"`
}

type input struct {
	Request  request         `json:"request"`
	Settings json.RawMessage `json:"settings"`
}

type request struct {
	Kind struct {
		Kind string `json:"kind"`
	} `json:"kind"`
	// Absent or null on DELETE.
	Object *struct {
		Metadata struct {
			Name        string            `json:"name"`
			Labels      map[string]string `json:"labels"`
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	} `json:"object"`
}

type verdict struct {
	Accepted bool    `json:"accepted"`
	Message  *string `json:"message,omitempty"`
	Code     *uint16 `json:"code,omitempty"`
}

type settingsVerdict struct {
	Valid   bool    `json:"valid"`
	Message *string `json:"message"`
}

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if len(args) != 1 {
		return fmt.Errorf("expected one argument, validate or validate-settings, not %d", len(args))
	}
	body, err := io.ReadAll(stdin)
	if err != nil {
		return fmt.Errorf("cannot read standard input: %w", err)
	}
	var answer any
	switch args[0] {
	case "validate":
		answer, err = validate(body, stderr)
	case "validate-settings":
		answer = validateSettings(body)
	default:
		err = fmt.Errorf("unknown command %q", args[0])
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(answer)
}

func validateSettings(body []byte) settingsVerdict {
	if _, _, err := readSettings(body); err != nil {
		message := err.Error()
		return settingsVerdict{Message: &message}
	}
	return settingsVerdict{Valid: true}
}

func readSettings(body []byte) (settings, map[string]*regexp.Regexp, error) {
	var s settings
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&s); err != nil {
		return s, nil, fmt.Errorf("cannot read the settings: %w", err)
	}
	if len(s.Required) == 0 {
		return s, nil, fmt.Errorf("required must name at least one label")
	}
	if slices.Contains(s.Required, "") {
		return s, nil, fmt.Errorf("required must not contain an empty name")
	}
	compiled := make(map[string]*regexp.Regexp, len(s.Patterns))
	for _, label := range sortedKeys(s.Patterns) {
		// Compiled without the anchors first, so that the error shows what the user wrote.
		_, err := regexp.Compile(s.Patterns[label])
		if err == nil {
			compiled[label], err = regexp.Compile(`\A(?:` + s.Patterns[label] + `)\z`)
		}
		if err != nil {
			return s, nil, fmt.Errorf("pattern of label %q: %w", label, err)
		}
	}
	return s, compiled, nil
}

func validate(body []byte, stderr io.Writer) (verdict, error) {
	var in input
	if err := json.Unmarshal(body, &in); err != nil {
		return verdict{}, fmt.Errorf("cannot read the request: %w", err)
	}
	s, patterns, err := readSettings(in.Settings)
	if err != nil {
		return verdict{}, err
	}
	if in.Request.Object == nil {
		return verdict{Accepted: true}, nil
	}
	meta := in.Request.Object.Metadata
	if meta.Annotations[debugAnnotation] == "true" {
		fmt.Fprintf(stderr, "labels: %s %s has %d labels\n", in.Request.Kind.Kind, meta.Name, len(meta.Labels))
	}

	var problems []string
	for _, label := range s.Required {
		if _, ok := meta.Labels[label]; !ok {
			problems = append(problems, fmt.Sprintf("label %q is missing", label))
		}
	}
	for _, label := range sortedKeys(patterns) {
		if value, ok := meta.Labels[label]; ok && !patterns[label].MatchString(value) {
			problems = append(problems, fmt.Sprintf("label %q has the value %q, which does not match %s",
				label, value, s.Patterns[label]))
		}
	}
	if len(problems) == 0 {
		return verdict{Accepted: true}, nil
	}
	message := strings.Join(problems, "; ")
	code := uint16(422)
	return verdict{Message: &message, Code: &code}, nil
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
