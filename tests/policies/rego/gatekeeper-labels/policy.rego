# Requires labels, and protects objects from being deleted. As it is written for Gatekeeper: a
# set of violations, with the constraint's parameters.
package labels

violation contains {"msg": msg, "details": {"missing": label}} if {
	input.review.operation != "DELETE"
	some label in input.parameters.labels
	not input.review.object.metadata.labels[label]
	msg := sprintf("label %s is missing", [label])
}

violation contains {"msg": msg} if {
	input.review.operation == "DELETE"
	input.review.object.metadata.labels.protected == "yes"
	msg := sprintf("%s is protected", [input.review.object.metadata.name])
}
