# Refuses images of other registries than the ones in its settings. As it is written for OPA:
# the answer is an admission review.
package policy

main := {
	"apiVersion": "admission.k8s.io/v1",
	"kind": "AdmissionReview",
	"response": response,
}

response := {"uid": input.request.uid, "allowed": true} if count(deny) == 0

response := {
	"uid": input.request.uid,
	"allowed": false,
	"status": {"message": concat(", ", sort(deny)), "code": 403},
} if count(deny) > 0

containers contains container if some container in input.request.object.spec.containers

containers contains container if some container in input.request.object.spec.initContainers

deny contains message if {
	some container in containers
	not allowed(container.image)
	message := sprintf("image %s is of no registry that is allowed", [container.image])
}

allowed(image) if {
	some registry in data.registries
	startswith(image, registry)
}

# Another entrypoint: everything may pass, with a warning.
lenient := {"response": {
	"uid": input.request.uid,
	"allowed": true,
	"warnings": sort(deny),
}}
