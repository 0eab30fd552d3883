// A policy with the WASI contract that runs Kyverno's engine: its settings have a Kyverno
// policy with validating rules, as text in YAML.
//
//	policy: |
//	  apiVersion: kyverno.io/v1
//	  kind: ClusterPolicy
//	  …
//
// The engine is Kyverno's own, without what needs a network: `_stubs` has packages that stand
// for those that verify images and manifests, and for a few that can't be built for WASI.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	kyvernov1 "github.com/kyverno/kyverno/api/kyverno/v1"
	kyvernov2 "github.com/kyverno/kyverno/api/kyverno/v2"
	"github.com/kyverno/kyverno/pkg/config"
	"github.com/kyverno/kyverno/pkg/engine"
	"github.com/kyverno/kyverno/pkg/engine/factories"
	"github.com/kyverno/kyverno/pkg/engine/jmespath"
	"github.com/kyverno/kyverno/pkg/engine/policycontext"
	admissionv1 "k8s.io/api/admission/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"
)

type settings struct {
	Policy string `json:"policy"`
}

type input struct {
	Request  admissionv1.AdmissionRequest `json:"request"`
	Settings settings                     `json:"settings"`
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

func (s settings) parse() (*kyvernov1.ClusterPolicy, error) {
	var policy kyvernov1.ClusterPolicy
	if err := yaml.Unmarshal([]byte(s.Policy), &policy); err != nil {
		return nil, fmt.Errorf("cannot read the policy: %w", err)
	}
	if len(policy.Spec.Rules) == 0 {
		return nil, fmt.Errorf("the policy has no rules")
	}
	return &policy, nil
}

func validateSettings(body []byte) any {
	var s settings
	err := json.Unmarshal(body, &s)
	if err == nil {
		_, err = s.parse()
	}
	if err != nil {
		return map[string]any{"valid": false, "message": err.Error()}
	}
	return map[string]any{"valid": true}
}

func validate(body []byte) (verdict, error) {
	var in input
	if err := json.Unmarshal(body, &in); err != nil {
		return verdict{}, fmt.Errorf("cannot read the request: %w", err)
	}
	policy, err := in.Settings.parse()
	if err != nil {
		return verdict{}, err
	}
	configuration := config.NewDefaultConfiguration(false)
	jp := jmespath.New(configuration)
	isCluster := false
	kyverno := engine.NewEngine(configuration, config.NewDefaultMetricsConfiguration(), jp, nil, nil,
		nil, factories.DefaultContextLoaderFactory(nil), nil, &isCluster)
	policyContext, err := policycontext.NewPolicyContextFromAdmissionRequest(jp, in.Request,
		kyvernov2.RequestInfo{AdmissionUserInfo: in.Request.UserInfo},
		schema.GroupVersionKind(in.Request.Kind), configuration)
	if err != nil {
		return verdict{}, err
	}
	response := kyverno.Validate(context.Background(), policyContext.WithPolicy(policy))
	var problems []string
	for _, rule := range response.PolicyResponse.Rules {
		if rule.HasStatus("fail", "error") {
			problems = append(problems, fmt.Sprintf("%s: %s", rule.Name(), rule.Message()))
		}
	}
	if len(problems) == 0 {
		return verdict{Accepted: true}, nil
	}
	message := strings.Join(problems, "; ")
	return verdict{Message: &message}, nil
}
