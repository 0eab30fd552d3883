// A policy with the WASI contract that judges by expressions in its settings, in the Common
// Expression Language:
//
//	variables:
//	- {name: containers, expression: "object.spec.containers"}
//	validations:
//	- {expression: "variables.containers.all(c, has(c.image))", message: "an image is missing"}
//
// `object` and `request` are what they are in a ValidatingAdmissionPolicy.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/ext"
)

type settings struct {
	Variables []struct {
		Name       string `json:"name"`
		Expression string `json:"expression"`
	} `json:"variables"`
	Validations []struct {
		Expression string `json:"expression"`
		Message    string `json:"message"`
	} `json:"validations"`
}

type verdict struct {
	Accepted bool    `json:"accepted"`
	Message  *string `json:"message,omitempty"`
	Code     *uint16 `json:"code,omitempty"`
}

// Set up before the request is read, as far as that can be done without the settings.
var environment, environmentError = cel.NewEnv(
	cel.Variable("object", cel.DynType),
	cel.Variable("request", cel.DynType),
	cel.Variable("variables", cel.MapType(cel.StringType, cel.DynType)),
	cel.OptionalTypes(),
	ext.Strings(),
	ext.Lists(),
	ext.Sets(),
	ext.Math(),
	ext.Encoders(),
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if environmentError != nil {
		return environmentError
	}
	body, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	var answer any
	switch {
	case len(os.Args) == 2 && os.Args[1] == "validate":
		answer, err = validate(body)
	case len(os.Args) == 2 && os.Args[1] == "validate-settings":
		answer = validateSettings(body)
	default:
		err = fmt.Errorf("the argument is validate or validate-settings")
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(answer)
}

func compile(expression string) (cel.Program, error) {
	ast, issues := environment.Compile(expression)
	if issues.Err() != nil {
		return nil, fmt.Errorf("%q: %w", expression, issues.Err())
	}
	return environment.Program(ast)
}

func validateSettings(body []byte) any {
	var s settings
	err := json.Unmarshal(body, &s)
	for _, variable := range s.Variables {
		if err == nil {
			_, err = compile(variable.Expression)
		}
	}
	for _, validation := range s.Validations {
		if err == nil {
			_, err = compile(validation.Expression)
		}
	}
	if err == nil && len(s.Validations) == 0 {
		err = fmt.Errorf("there is no validation")
	}
	if err != nil {
		return map[string]any{"valid": false, "message": err.Error()}
	}
	return map[string]any{"valid": true}
}

func validate(body []byte) (verdict, error) {
	var in struct {
		Request  map[string]any `json:"request"`
		Settings settings       `json:"settings"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return verdict{}, fmt.Errorf("cannot read the request: %w", err)
	}
	variables := make(map[string]any)
	known := map[string]any{
		"object": in.Request["object"], "request": in.Request, "variables": variables,
	}
	for _, variable := range in.Settings.Variables {
		value, err := evaluate(variable.Expression, known)
		if err != nil {
			return verdict{}, err
		}
		variables[variable.Name] = value
	}
	for _, validation := range in.Settings.Validations {
		value, err := evaluate(validation.Expression, known)
		if err != nil {
			return verdict{}, err
		}
		if value != true {
			message, code := validation.Message, uint16(422)
			return verdict{Message: &message, Code: &code}, nil
		}
	}
	return verdict{Accepted: true}, nil
}

func evaluate(expression string, known map[string]any) (any, error) {
	program, err := compile(expression)
	if err != nil {
		return nil, err
	}
	value, _, err := program.Eval(known)
	if err != nil {
		return nil, fmt.Errorf("%q: %w", expression, err)
	}
	return value.Value(), nil
}
