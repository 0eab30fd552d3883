// Package notary verifies nothing here.
package notary

import "github.com/kyverno/kyverno/pkg/images"

// NewVerifier gives none.
func NewVerifier() images.ImageVerifier {
	return nil
}
