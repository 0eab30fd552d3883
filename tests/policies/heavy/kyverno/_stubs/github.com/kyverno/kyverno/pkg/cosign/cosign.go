// Package cosign verifies nothing here.
package cosign

import "github.com/kyverno/kyverno/pkg/images"

// NewVerifier gives none.
func NewVerifier() images.ImageVerifier {
	return nil
}
