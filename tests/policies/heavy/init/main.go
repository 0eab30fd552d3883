// A validating policy with the WASI contract that takes long to begin: before it reads its
// request it compiles regular expressions, fills tables and parses templates, as the package
// variables of a large policy engine do. What it decides is simple: labels must have names
// and values that its expressions accept.
//
// It takes about 200 ms to begin, and about 2 s when it is built with the tag `long`.
package main

import (
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"text/template"
)

var (
	expressions = compileExpressions()
	tables      = fillTables()
	templates   = parseTemplates()
)

// An expression for each of many prefixes of labels, with letters of all scripts.
func compileExpressions() []*regexp.Regexp {
	var compiled []*regexp.Regexp
	for round := range rounds {
		compiled = compiled[:0]
		for index := range 100 {
			compiled = append(compiled, regexp.MustCompile(fmt.Sprintf(
				`(?i)^team-%d-%d\.[\pL\pN]{1,30}(?:-[\p{Greek}\p{Latin}\d]{1,10}){0,3}$`, round, index)))
		}
	}
	return compiled
}

// Checksums of many names.
func fillTables() map[string]uint32 {
	var table map[string]uint32
	for range rounds {
		table = make(map[string]uint32)
		for index := range 40_000 {
			name := fmt.Sprintf("name-%d", index)
			table[name] = crc32.ChecksumIEEE([]byte(name))
		}
	}
	return table
}

func parseTemplates() []*template.Template {
	var parsed []*template.Template
	for range rounds {
		parsed = parsed[:0]
		for index := range 400 {
			text := fmt.Sprintf(`label %d: {{range $name, $value := .}}{{if eq $name ""}}no name{{else}}{{printf "%%q" $name}}{{end}}{{end}}`, index)
			parsed = append(parsed, template.Must(template.New(fmt.Sprint(index)).Parse(text)))
		}
	}
	return parsed
}

type input struct {
	Request struct {
		Object *struct {
			Metadata struct {
				Labels map[string]string `json:"labels"`
			} `json:"metadata"`
		} `json:"object"`
	} `json:"request"`
}

type verdict struct {
	Accepted bool    `json:"accepted"`
	Message  *string `json:"message,omitempty"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	body, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	if len(os.Args) == 2 && os.Args[1] == "validate-settings" {
		_, err = os.Stdout.WriteString(`{"valid":true}`)
		return err
	}
	var in input
	if err := json.Unmarshal(body, &in); err != nil {
		return fmt.Errorf("cannot read the request: %w", err)
	}
	return json.NewEncoder(os.Stdout).Encode(validate(in))
}

func validate(in input) verdict {
	if in.Request.Object == nil {
		return verdict{Accepted: true}
	}
	var problems []string
	for name, value := range in.Request.Object.Metadata.Labels {
		// Labels of teams are for the expressions, and names in the table are taken.
		_, taken := tables[value]
		refused := strings.HasPrefix(value, "team-") && !slices.ContainsFunc(expressions,
			func(expression *regexp.Regexp) bool { return expression.MatchString(value) })
		if taken || refused {
			problems = append(problems, fmt.Sprintf("label %q has the value %q", name, value))
		}
	}
	if len(problems) == 0 {
		return verdict{Accepted: true}
	}
	slices.Sort(problems)
	message := fmt.Sprintf("%s (%d templates)", strings.Join(problems, "; "), len(templates))
	return verdict{Message: &message}
}
