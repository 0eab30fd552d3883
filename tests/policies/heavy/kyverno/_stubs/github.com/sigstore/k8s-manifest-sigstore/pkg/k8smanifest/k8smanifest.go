// Package k8smanifest has the types that Kyverno's own are made of.
package k8smanifest

// ObjectReference selects objects.
type ObjectReference struct {
	Group     string `json:"group,omitempty"`
	Version   string `json:"version,omitempty"`
	Kind      string `json:"kind,omitempty"`
	Name      string `json:"name,omitempty"`
	Namespace string `json:"namespace,omitempty"`
}

// ObjectReferenceList selects objects.
type ObjectReferenceList []ObjectReference

// ObjectFieldBinding selects fields of objects.
type ObjectFieldBinding struct {
	Fields  []string            `json:"fields,omitempty"`
	Objects ObjectReferenceList `json:"objects,omitempty"`
}
